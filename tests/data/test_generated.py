"""The generated task and text are fair: nothing that is tested was trained on, and labels cannot be looked up."""

import csv
import hashlib
import math
import random
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from mabert.data import generated
from mabert.data.corpus import iter_documents
from mabert.data.generated import PLURAL, SINGULAR, Cast

NOUN_FORMS = {form: pair for pair in generated.NOUNS for form in pair}


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["sentence"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]


def documents(path: Path) -> list[list[str]]:
    return [document.split("\n") for document in iter_documents(path)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], list[list[str]]]:
    """The documents of train and of valid."""
    train, valid = generated.write_text(tmp_path_factory.mktemp("text"), train=400, valid=100)
    return documents(train), documents(valid)


# The task


def test_train_and_dev_share_no_sentence(tmp_path: Path) -> None:
    train, dev = (rows(path) for path in generated.write_tables(tmp_path, 3000, 500))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.tsv", "train.tsv"]
    assert (len(train), len(dev)) == (3000, 500)
    sentences = [sentence for sentence, _ in train + dev]
    assert len(set(sentences)) == len(sentences)


def test_a_sentence_and_its_broken_form_are_never_both_there() -> None:
    """Seen from the words alone: no unacceptable sentence is one swap of neighbours away from an acceptable one."""
    found = dict(generated.examples(3000))
    for sentence in found:
        words = sentence.rstrip(".").split()
        for place in range(len(words) - 1):
            swapped = [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            other = " ".join(swapped).capitalize() + "."
            assert other == sentence or found.get(other, found[sentence]) == found[sentence]


def test_the_labels_are_balanced_and_the_tables_repeat(tmp_path: Path) -> None:
    train, _ = generated.write_tables(tmp_path / "a", 2000, 100)
    again, _ = generated.write_tables(tmp_path / "b", 2000, 100)
    other, _ = generated.write_tables(tmp_path / "b", 2000, 100, seed=1)
    assert rows(train) == generated.examples(2000)
    assert train.read_bytes() != other.read_bytes()
    assert sum(label == "acceptable" for _, label in rows(train)) == 1000
    generated.write_tables(tmp_path / "b", 2000, 100)
    assert train.read_bytes() == again.read_bytes()


def test_the_rows_stay_what_they_are() -> None:
    digest = hashlib.sha256(repr(generated.examples(generated.TRAIN_ROWS + generated.DEV_ROWS)).encode()).hexdigest()
    assert digest.startswith("3d0450f4b5798e94")


def test_acceptable_sentences_agree() -> None:
    rng = random.Random(1)
    singular_verbs = {"is", "does"} | {singular for singular, _ in generated.VERBS}
    for _ in range(500):
        words = Cast().sentence(rng)
        texts = [word.text for word in words]
        for place, word in enumerate(words):
            noun = next((text for text in texts[place:] if text in NOUN_FORMS), "")
            if word.kind == "determiner":
                determiner = "a" if word.text == "an" else word.text
                assert determiner in generated.DETERMINERS[number_of(noun)]
                assert (word.text == "an") == (determiner == "a" and texts[place + 1][0] in "aeiou")
        subject = next(text for text in texts if text in NOUN_FORMS)
        verb = next(word.text for word in words if word.kind == "verb")
        assert (verb in singular_verbs) == (number_of(subject) == SINGULAR)


def number_of(noun: str) -> int:
    return SINGULAR if noun == NOUN_FORMS[noun][SINGULAR] else PLURAL


def test_broken_sentences_have_one_fault() -> None:
    rng = random.Random(1)
    faults = set()
    for _ in range(500):
        words = Cast().sentence(rng)
        wrong = generated.broken(rng, words)
        changed = [place for place, (a, b) in enumerate(zip(words, wrong, strict=True)) if a.text != b.text]
        if len(changed) == 1:
            faults.add(words[changed[0]].kind)
        else:
            faults.add("order")
            assert changed[1:] == [changed[0] + 1]
            assert sorted(word.text for word in wrong) == sorted(word.text for word in words)
    assert faults == {"verb", "determiner", "order"}


# The text


def test_sentences_are_distinct_and_repeat() -> None:
    some = generated.sentences(300, seed=3)
    assert len(set(some)) == 300
    assert generated.sentences(100, seed=3) == some[:100]
    assert generated.sentences(100, seed=4) != some[:100]
    known = {word.lower() for sentence, _ in generated.examples(2000) for word in sentence.rstrip(".").split()}
    assert {word.lower() for sentence in some for word in sentence.rstrip(".").split()} <= known


def test_text_repeats_with_its_seed(tmp_path: Path) -> None:
    first, again, other, more = (
        generated.write_text(tmp_path / name, train=train, valid=5, seed=seed, task_rows=100)
        for name, train, seed in (("a", 20, 0), ("b", 20, 0), ("c", 20, 1), ("d", 30, 0))
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train.txt", "valid.txt"]
    for path, same, different in zip(first, again, other, strict=True):
        assert path.read_bytes() == same.read_bytes() != different.read_bytes()
    assert more[1].read_bytes() == first[1].read_bytes()
    assert documents(more[0])[:20] == documents(first[0])


def test_train_and_valid_share_no_sentence(text: tuple[list[list[str]], list[list[str]]]) -> None:
    train, valid = text
    assert (len(train), len(valid)) == (400, 100)
    assert not set(chain(*train)) & set(chain(*valid))
    for document in train + valid:
        assert 5 <= len(set(document)) == len(document) <= 20


def test_no_sentence_of_the_task_is_in_the_text(text: tuple[list[list[str]], list[list[str]]], tmp_path: Path) -> None:
    """Nor one that only a fault keeps apart from it: what is in the text is acceptable, and so a label is known."""
    sentences = set(chain(*text[0], *text[1]))
    task = generated.examples(8500)
    assert not sentences & {sentence for sentence, _ in task}
    for sentence, label in task:
        words = sentence.rstrip(".").split()
        for place in range(len(words) - 1) if label == "unacceptable" else ():
            swapped = [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            assert " ".join(swapped).capitalize() + "." not in sentences
    unguarded = generated.write_text(tmp_path, train=400, valid=100, task_rows=0)
    assert set(chain.from_iterable(chain(*map(documents, unguarded)))) & {sentence for sentence, _ in task}


def test_a_document_tells_its_words_better_than_the_text_does(
    text: tuple[list[list[str]], list[list[str]]],
) -> None:
    """Nouns guessed from how often they come in the text, and from how often in the document's other sentences."""
    by_document = [
        [[NOUN_FORMS[word][0] for word in sentence.rstrip(".").lower().split() if word in NOUN_FORMS] for sentence in d]
        for d in text[0]
    ]
    everywhere = Counter(chain.from_iterable(chain(*by_document)))
    total = sum(everywhere.values())
    assert len(everywhere) == len(generated.NOUNS)
    from_text, from_document = [], []
    for document in by_document:
        assert len(set(chain(*document))) <= 3
        for number, sentence in enumerate(document):
            others = Counter(chain(*document[:number], *document[number + 1 :]))
            for noun in sentence:
                share = everywhere[noun] / total
                from_text.append(-math.log(share))
                from_document.append(-math.log((others[noun] + share) / (sum(others.values()) + 1)))
    assert sum(from_text) / len(from_text) > 3.0
    assert sum(from_document) / len(from_document) < 1.5
