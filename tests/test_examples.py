"""The examples run, and the demo's two tasks are fair: nothing of what is tested was trained on."""

import csv
import random
from pathlib import Path

import pytest

import acceptability
import stdlib_text
from acceptability import PLURAL, SINGULAR


@pytest.fixture(scope="module")
def documents() -> list[list[str]]:
    return list(stdlib_text.documents())


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["sentence"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]


def test_the_standard_library_gives_a_megabyte_of_prose_the_same_each_time(documents: list[list[str]]) -> None:
    assert sum(len(paragraph) for document in documents for paragraph in document) > 1_000_000
    assert documents[:20] == [document for document, _ in zip(stdlib_text.documents(), range(20), strict=False)]


def test_no_paragraph_comes_twice(documents: list[list[str]]) -> None:
    paragraphs = [paragraph for document in documents for paragraph in document]
    assert len(paragraphs) == len(set(paragraphs))


def test_every_tenth_document_is_held_out(
    tmp_path: Path, documents: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_text, "documents", lambda: documents)
    train, heldout = (path.read_text(encoding="utf-8") for path in stdlib_text.write_text(tmp_path))
    assert heldout.rstrip("\n").split("\n\n") == ["\n".join(document) for document in documents[::10]]
    assert len(train.split("\n\n")) + len(heldout.split("\n\n")) == len(documents)
    assert not set(train.splitlines()) & set(heldout.splitlines()) - {""}


def test_what_is_no_prose_is_left_out() -> None:
    text = "A sentence of more words.\n\n>>> print('one two three four five')\n\na ::= b c d e f g\n\ntoo short\n"
    assert list(stdlib_text.paragraphs(text)) == ["A sentence of more words."]


def test_train_and_test_share_no_sentence(tmp_path: Path) -> None:
    train, test = (rows(path) for path in acceptability.write_tables(tmp_path, 3000, 500))
    assert (len(train), len(test)) == (3000, 500)
    sentences = [sentence for sentence, _ in train + test]
    assert len(set(sentences)) == len(sentences)


def test_a_sentence_and_its_broken_form_are_never_both_there() -> None:
    """Seen from the words alone: no unacceptable sentence is one swap of neighbours away from an acceptable one."""
    found = dict(acceptability.examples(3000))
    for sentence in found:
        words = sentence.rstrip(".").split()
        for place in range(len(words) - 1):
            swapped = [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            other = " ".join(swapped).capitalize() + "."
            assert other == sentence or found.get(other, found[sentence]) == found[sentence]


def test_the_labels_are_balanced_and_the_tables_repeat(tmp_path: Path) -> None:
    train, _ = acceptability.write_tables(tmp_path / "a", 2000, 100)
    again, _ = acceptability.write_tables(tmp_path / "b", 2000, 100)
    assert train.read_bytes() == again.read_bytes()
    share = sum(label == "acceptable" for _, label in rows(train)) / 2000
    assert 0.45 < share < 0.55


def number_of(noun: str) -> int:
    return SINGULAR if noun in {singular for singular, _ in acceptability.pairs(acceptability.NOUNS)} else PLURAL


def test_acceptable_sentences_agree() -> None:
    rng = random.Random(1)
    nouns = {form for pair in acceptability.pairs(acceptability.NOUNS) for form in pair}
    singular_verbs = {"is", "does"} | {singular for singular, _ in acceptability.pairs(acceptability.VERBS)}
    for _ in range(500):
        words = acceptability.sentence(rng)
        texts = [word.text for word in words]
        for place, word in enumerate(words):
            noun = next((text for text in texts[place:] if text in nouns), "")
            if word.kind == "determiner":
                determiner = "a" if word.text == "an" else word.text
                assert determiner in acceptability.DETERMINERS[number_of(noun)]
                assert (word.text == "an") == (determiner == "a" and texts[place + 1][0] in "aeiou")
        subject = next(text for text in texts if text in nouns)
        verb = next(word.text for word in words if word.kind == "verb")
        assert (verb in singular_verbs) == (number_of(subject) == SINGULAR)


def test_broken_sentences_have_one_fault() -> None:
    rng = random.Random(1)
    faults = set()
    for _ in range(500):
        words = acceptability.sentence(rng)
        wrong = acceptability.broken(rng, words)
        changed = [place for place, (a, b) in enumerate(zip(words, wrong, strict=True)) if a.text != b.text]
        if len(changed) == 1:
            faults.add(words[changed[0]].kind)
        else:
            faults.add("order")
            assert changed[1:] == [changed[0] + 1]
            assert sorted(word.text for word in wrong) == sorted(word.text for word in words)
    assert faults == {"verb", "determiner", "order"}


def test_its_words_are_those_of_the_documentation(documents: list[list[str]]) -> None:
    known = set(" ".join(paragraph for document in documents for paragraph in document).lower().split())
    rng = random.Random(2)
    used = {word.text for _ in range(2000) for word in acceptability.sentence(rng)}
    assert used <= known
