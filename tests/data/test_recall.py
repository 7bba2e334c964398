"""Recall tasks: facts where they should stand, questions about them, and answers counted."""

from collections import Counter

import numpy as np
import pytest
import torch

from mabert.data.recall import (
    BEGIN,
    DIGITS,
    FIRST,
    KINDS,
    MARK,
    PLACES,
    QUESTION,
    CopyTask,
    Language,
    RecallDataset,
    RecallTask,
    answers_right,
)
from mabert.data.tokenizer import train_tokenizer

SETTINGS = [("mqar", 6, 96), ("phonebook", 5, 96), ("passkey", 1, 64)]


def task(kind="mqar", pairs=6, length=96, **changes):
    return RecallTask(kind=kind, pairs=pairs, length=length, **changes)


def facts_and_questions(made, sample):
    """(cue, answer) pairs of the context with their places, and those of the questions."""
    shape, ids = made.shape, sample.ids.tolist()
    asked, at = [], sample.questions_begin
    while at < len(ids):
        assert ids[at] == QUESTION
        cue = tuple(ids[at + 1 : at + 1 + shape.cue])
        asked.append((cue, tuple(ids[at + 1 + shape.cue : at + 1 + shape.cue + shape.answer])))
        at += 1 + shape.cue + shape.answer
    context = ids[: sample.questions_begin]
    places = []
    for cue, answer in asked:
        fact = [*cue, *answer]
        found = [i for i in range(len(context)) if context[i : i + len(fact)] == fact]
        assert found, "the fact that is asked for stands in the context"
        places.append(found[0])
    return asked, places


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("kind", "pairs", "length"), SETTINGS)
def test_every_question_has_its_fact_at_its_place(kind, pairs, length, place):
    made = task(kind, pairs, length, place=place)
    for index in range(30):
        sample = made.sample(3, index)
        assert sample.ids.shape == sample.labels.shape == (length,)
        assert sample.ids[0] == BEGIN
        asked, places = facts_and_questions(made, sample)
        assert len(asked) == made.questions
        room = length - made.least_length
        first = {"early": 1, "middle": 1 + room // 2, "late": 1 + room}.get(place)
        if first is not None:
            width = pairs * (made.shape.cue + made.shape.answer)
            assert all(first <= at < first + width for at in places)
    if place == "spread":
        starts = [facts_and_questions(made, made.sample(0, i))[1][0] for i in range(60)]
        assert max(starts) - min(starts) > length / 4


@pytest.mark.parametrize(("kind", "pairs", "length"), SETTINGS)
def test_only_answers_are_labelled(kind, pairs, length):
    made = task(kind, pairs, length)
    sample = made.sample(0, 0)
    labelled = sample.labels != -100
    assert (sample.labels[labelled] == sample.ids[labelled]).all()
    assert labelled.sum() == made.questions * made.shape.answer
    assert not labelled[: sample.questions_begin].any()


def test_keys_are_different_and_asked_once_and_filler_holds_none_of_them():
    made = task("mqar", 20, 200)
    sample = made.sample(0, 5)
    asked, _ = facts_and_questions(made, sample)
    assert max(Counter(cue for cue, _ in asked).values()) == 1
    context = Counter(sample.ids[: sample.questions_begin].tolist())
    assert all(context[cue[0]] == 1 for cue, _ in asked)


def test_neither_an_order_nor_a_key_alone_tells_a_value():
    """Over many rows: the facts stand in any order, are asked in any other, and a key has other values elsewhere."""
    made = task(pairs=3, length=64, vocab_size=60)
    by_key, facts_sorted, asked_in_order, rows = {}, 0, 0, 400
    for index in range(rows):
        asked, places = facts_and_questions(made, made.sample(5, index))
        for (key,), (value,) in asked:
            by_key.setdefault(key, Counter())[value] += 1
        keys = [asked[question][0][0] for question in np.argsort(places)]
        facts_sorted += keys == sorted(keys)
        asked_in_order += places == sorted(places)
    assert len(by_key) == 12
    for values in by_key.values():
        assert len(values) > 8
        assert max(values.values()) < values.total() / 4
    for ordered in (facts_sorted, asked_in_order):
        assert 0.08 < ordered / rows < 0.26, "one of six orders"


class TestGuessing:
    """What is right without finding anything: by naming the values of the row, each once."""

    def test_rows_to_guess_in_are_needed(self):
        with pytest.raises(ValueError, match="rows=0 must be at least 1"):
            task().guessing(0, 1)

    @pytest.mark.parametrize("pairs", [2, 4, 20])
    def test_of_many_facts_one_of_those_not_yet_given(self, pairs):
        """Of n values that differ, each guess is one of those that are left: a harmonic number of n over n."""
        expected = sum(1 / left for left in range(1, pairs + 1)) / pairs
        made = task(pairs=pairs, length=200, vocab_size=20_000)
        assert made.guessing(4_000, 0) == pytest.approx(expected, abs=0.02)
        assert made.guessing_loss == pytest.approx(sum(np.log(left) for left in range(1, pairs + 1)) / pairs)

    def test_it_is_higher_where_values_repeat(self):
        assert task(pairs=20, length=200, vocab_size=94).guessing(500, 0) > 0.25

    def test_of_one_number_asked_one_in_so_many(self):
        made = task("phonebook", pairs=5)
        assert made.guessing(4_000, 0) == pytest.approx(0.2, abs=0.02)
        assert made.guessing_loss == pytest.approx(np.log(5) / 4)

    def test_of_one_passkey_all_since_nothing_else_is_in_the_row(self):
        made = task("passkey", pairs=1)
        assert made.guessing(10, 0) == 1.0
        assert made.guessing_loss == 0


def test_names_of_a_phonebook_stand_only_in_its_facts():
    made = RecallTask(kind="phonebook", length=256, pairs=4, vocab_size=64)
    for index in range(100):
        ids = made.sample(0, index).ids
        facts = np.flatnonzero(np.isin(ids, ids[-6:-4]))  # the question is a mark, two words of a name, four digits
        assert len(facts) <= 2 + 2 * made.pairs, "as often as facts and the question can have them"


def test_names_of_a_phonebook_are_told_apart():
    made = task("phonebook", 40, 400)
    for index in range(20):
        sample = made.sample(1, index)
        (((cue, _),), _), context = facts_and_questions(made, sample), sample.ids[: sample.questions_begin].tolist()
        assert min(cue) >= FIRST + DIGITS
        assert sum(tuple(context[i : i + 2]) == cue for i in range(len(context))) == 1


def test_neither_name_alone_tells_a_number():
    made = task("phonebook", 16, 16 * 6 + 40, place="early")
    context = made.sample(0, 0).ids[1 : 1 + 16 * 6].reshape(16, 6)
    for name in context[:, 0], context[:, 1]:
        assert len(set(name.tolist())) <= 8, "names of several persons"
    assert len({tuple(name) for name in context[:, :2].tolist()}) == 16


def test_the_passkey_stands_once():
    sample = task("passkey", 1, 120).sample(0, 0)
    assert (sample.ids[: sample.questions_begin] == MARK).sum() == 1


def test_samples_are_a_function_of_seed_and_index():
    made = task()
    assert np.array_equal(made.sample(1, 2).ids, made.sample(1, 2).ids)
    assert not np.array_equal(made.sample(1, 2).ids, made.sample(1, 3).ids)
    assert not np.array_equal(made.sample(1, 2).ids, made.sample(2, 2).ids)


def test_a_dataset_has_the_rows_of_a_stream_and_says_where_the_questions_begin():
    made = task()
    dataset = RecallDataset(made, rows=4, seed=1)
    assert len(dataset) == 4
    row, sample = dataset[2], made.sample(1, 2)
    assert torch.equal(row["input_ids"], torch.from_numpy(sample.ids))
    assert torch.equal(row["labels"], torch.from_numpy(sample.labels))
    assert row["segments"].tolist() == [0] * sample.questions_begin + [1] * (96 - sample.questions_begin)
    with pytest.raises(IndexError, match="row 4 of 4"):
        dataset[4]


class TestCopying:
    def test_a_piece_comes_twice_and_all_but_its_first_word_is_asked(self):
        made, pieces = CopyTask(length=25, vocab_size=40), set()
        for index in range(60):
            sample = made.sample(3, index)
            assert sample.ids[0] == BEGIN
            assert sample.ids[1:].min() >= FIRST + DIGITS
            piece = 25 - sample.questions_begin
            pieces.add(piece)
            assert np.array_equal(sample.ids[-piece:], sample.ids[1 : 1 + piece])
            labelled = sample.labels != -100
            assert labelled.tolist() == [False] * (25 - piece + 1) + [True] * (piece - 1)
            assert np.array_equal(sample.labels[labelled], sample.ids[labelled])
        assert pieces == set(range(6, 13)), "from a quarter to a half of the row"

    def test_rows_are_different_and_a_function_of_seed_and_index(self):
        made = CopyTask(length=25, vocab_size=40)
        rows = {tuple(made.sample(seed, index).ids) for seed in range(2) for index in range(20)}
        assert len(rows) == 40
        assert np.array_equal(made.sample(1, 2).ids, made.sample(1, 2).ids)

    def test_there_must_be_room_and_words(self):
        assert len(CopyTask(length=8).sample(0, 0).ids) == 8
        with pytest.raises(ValueError, match="length=7 must be at least 8"):
            CopyTask(length=7)
        with pytest.raises(ValueError, match="vocab_size=14 must be above 14"):
            CopyTask(length=8, vocab_size=14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_can_be_as_short_as_the_facts_allow(kind):
    pairs = 1 if kind == "passkey" else 7
    shortest = RecallTask.shortest(kind=kind, pairs=pairs, vocab_size=512)
    least = shortest.length
    assert shortest == RecallTask(kind=kind, pairs=pairs, length=least)
    assert len(shortest.sample(0, 0).ids) == least
    with pytest.raises(ValueError, match=f"take at least {least} tokens, but length={least - 1}: give a longer row"):
        RecallTask(kind=kind, pairs=pairs, length=least - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "needle"}, "there is no recall task 'needle'. There are mqar, phonebook, passkey"),
        ({"place": "end"}, "place='end' is not one of early, middle, late, spread"),
        ({"pairs": 0}, "pairs=0 must be at least 1"),
        ({"pairs": 4.5}, "pairs=4.5 must be a whole number"),
        ({"kind": "passkey", "pairs": 2}, "a text holds one passkey"),
        ({"pairs": 30, "length": 400, "vocab_size": 100}, "takes a vocabulary of at least 134 tokens"),
        ({"pairs": 100, "length": 128}, r"100 facts of mqar and their questions take at least 501 tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        task(**changes)


def test_answers_are_right_in_all_of_their_tokens():
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100], [-100, -100, 5, 5, -100, 8]])
    logits = torch.zeros(2, 6, 10)

    def say(row, place, token):
        logits[row, place - 1, token] = 1

    for row, place, token in ((0, 1, 5), (0, 2, 9), (0, 4, 7), (1, 2, 5), (1, 3, 5), (1, 5, 1)):
        say(row, place, token)
    assert answers_right(logits, labels).tolist() == [False, True, True, False]
    assert answers_right(logits, torch.full((2, 6), -100)).tolist() == []


@pytest.fixture(scope="module")
def language():
    words = [a + b for a in ("cat", "dog", "bird", "fish", "horse") for b in ("ing", "ness", "ville", "ford", "ton",
             "berg", "stein", "son", "man", "ley", "field", "wood", "worth", "burn")]  # fmt: skip
    text = " ".join(words * 3) + " 0 1 2 3 4 5 6 7 8 9 . : " * 3
    tokenizer = train_tokenizer([text], vocab_size=800, min_frequency=1)
    return tokenizer, Language.of(tokenizer, np.array(tokenizer(text).input_ids[1:-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_asked_in_the_tokens_of_a_tokenizer(kind, language):
    tokenizer, spoken = language
    made = task(kind, 1 if kind == "passkey" else 3, 64, vocab_size=60)
    sample, own = made.sample(0, 4, spoken), made.sample(0, 4)
    assert sample.questions_begin == own.questions_begin
    labelled = own.labels != -100
    assert (sample.labels[labelled] == spoken.words[own.labels[labelled]]).all()
    assert (sample.labels[~labelled] == -100).all()
    assert (sample.ids[own.questions_begin :] == spoken.words[own.ids[own.questions_begin :]]).all()
    assert sample.ids[0] == tokenizer.cls_token_id
    if kind != "mqar":
        answer = tokenizer.convert_ids_to_tokens(sample.labels[labelled])
        assert all(token.isdigit() for token in answer)
    fillers = [tuple(spoken.text[i : i + 4]) for i in range(len(spoken.text) - 4)]
    context = sample.ids[1 : sample.questions_begin]
    assert any(tuple(context[i : i + 4]) in fillers for i in range(len(context) - 4)), "real text stands between"


def test_copying_in_the_tokens_of_a_tokenizer(language):
    _, spoken = language
    made = CopyTask(length=25, vocab_size=40)
    own, sample = made.sample(0, 0), made.sample(0, 0, spoken)
    assert np.array_equal(sample.ids, spoken.words[own.ids])
    assert sample.questions_begin == own.questions_begin
    assert np.array_equal(sample.labels, np.where(own.labels == -100, -100, sample.ids))
    with pytest.raises(ValueError, match="vocab_size=512 is over the"):
        CopyTask(length=25).sample(0, 0, spoken)


def test_a_language_that_is_too_small_is_refused(language):
    _, spoken = language
    with pytest.raises(ValueError, match="vocab_size=512 is over the"):
        task(vocab_size=512).sample(0, 0, spoken)
    with pytest.raises(ValueError, match="is shorter than a row of 96"):
        task(vocab_size=60).sample(0, 0, Language(spoken.words, spoken.text[:50]))
    poor = train_tokenizer(["a b c"] * 3, vocab_size=30)
    with pytest.raises(ValueError, match="the text has 0 words of more than three letters that are one token"):
        Language.of(poor, spoken.text)


def test_words_are_those_that_the_text_has_whole(language):
    tokenizer, spoken = language
    vocabulary = tokenizer.get_vocab()
    whole = sorted({token for token in vocabulary if token.isalpha() and len(token) > 3})
    (goes_on, *_) = (id for token, id in vocabulary.items() if token.startswith("##"))
    longer = np.array([[vocabulary[word], goes_on] for word in ("catness", "horseburn")]).flatten()
    others = np.array([vocabulary[word] for word in whole if word not in ("catness", "horseburn")])
    rest = np.append(others, spoken.words[:FIRST])
    words = set(tokenizer.convert_ids_to_tokens(Language.of(tokenizer, np.append(longer, rest)).words.tolist()))
    assert "fishton" in words
    assert not words & {"catness", "horseburn"}, "these are beginnings of longer ones"


def test_no_real_text_repeats_what_is_asked_for(language):
    _, spoken = language
    for kind in KINDS:
        made = task(kind, 1 if kind == "passkey" else 3, 64, vocab_size=60)
        for index in range(20):
            sample, own = made.sample(0, index, spoken), made.sample(0, index)
            context = Counter(sample.ids[: sample.questions_begin].tolist())
            assert context[spoken.words[QUESTION]] == 0
            asked, _ = facts_and_questions(made, own)
            for cue, _ in asked:
                if kind != "phonebook":  # whose facts share their names
                    assert context[spoken.words[cue[0]]] == 1


def test_words_stand_for_digits_where_there_are_none():
    words = " ".join(chr(97 + a) + chr(97 + b) + "ster" for a in range(10) for b in range(10))
    plain = train_tokenizer([words], vocab_size=400, min_frequency=1)
    made = Language.of(plain, np.array(plain(words).input_ids[1:-1]))
    tokens = plain.convert_ids_to_tokens(made.words[FIRST:].tolist())
    assert all(token.isalpha() for token in tokens)
    marks = plain.convert_ids_to_tokens(made.words[[QUESTION, MARK]].tolist())
    assert len({*tokens, *marks}) == len(tokens) + 2
