"""Recall: facts in a long row, and questions about them at its end. Generated, as token ids.

- `mqar`: pairs of a key and a value, and every key asked for (multi-query associative recall, Arora et al. 2023).
- `phonebook`: names of two tokens with numbers of four digits, and one name asked for.
- `passkey`: one number of five digits in a monotonous text, and it is asked for.

Before these, a model may learn to copy (`CopyTask`): a text that comes twice.

What is generated is a function of (seed, index) alone.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from mabert.data.mlm import IGNORED

PLACES = ("early", "middle", "late", "spread")
"""Where in the row the facts stand: in one piece at its beginning, in its middle, right before the questions; or each
anywhere."""

PAD, BEGIN, QUESTION, MARK = 0, 1, 2, 3
FIRST = 4
"""The first id of a word."""
DIGITS = 10
LEAST_WORDS = 70
PHRASE = 12  # words in the text of `passkey`, which is said again and again


@dataclass(frozen=True)
class Kind:
    """The shape of a fact: so many tokens that it is asked by, and so many that answer."""

    cue: int
    answer: int
    all_asked: bool


KINDS = {"mqar": Kind(1, 1, True), "phonebook": Kind(2, 4, False), "passkey": Kind(1, 5, False)}


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """One setting of a task.

    Raises:
        ValueError: there is no such kind or place, or the row is too short for so many facts, or the vocabulary is too
            small for so many different ones; the message says what it would take.
    """

    kind: str
    length: int
    """Tokens of a row, questions and answers included."""
    pairs: int = 1
    """Facts in it."""
    place: str = "spread"
    vocab_size: int = 512

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no recall task {self.kind!r}. There are {', '.join(KINDS)}.")
        if self.place not in PLACES:
            raise ValueError(f"place={self.place!r} is not one of {', '.join(PLACES)}.")
        for name in ("length", "pairs", "vocab_size"):
            if not isinstance(value := getattr(self, name), int):
                raise ValueError(f"{name}={value!r} must be a whole number.")
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1.")
        if self.kind == "passkey" and self.pairs != 1:
            raise ValueError(f"pairs={self.pairs}: a text holds one passkey.")
        if self.length < self.least_length:
            raise ValueError(
                f"{self.pairs} {'fact' if self.pairs == 1 else 'facts'} of {self.kind} and their questions take at "
                f"least {self.least_length} tokens, but length={self.length}: give a longer row, or fewer pairs."
            )
        if self.vocab_size < self.least_vocabulary:
            raise ValueError(
                f"{self.kind} with {self.pairs} pairs takes a vocabulary of at least {self.least_vocabulary} tokens, "
                f"but vocab_size={self.vocab_size}."
            )

    @classmethod
    def shortest(cls, *, kind: str, pairs: int, vocab_size: int) -> "RecallTask":
        """So many facts and their questions in a row that has room for nothing else."""
        roomy = cls(kind=kind, length=10**9, pairs=pairs, vocab_size=vocab_size)
        return replace(roomy, length=roomy.least_length)

    @property
    def shape(self) -> Kind:
        """Of its facts."""
        return KINDS[self.kind]

    @property
    def questions(self) -> int:
        """Facts that are asked for."""
        return self.pairs if self.shape.all_asked else 1

    @property
    def least_length(self) -> int:
        """Tokens of a row without anything between the facts and the questions."""
        fact = self.shape.cue + self.shape.answer
        return 1 + self.pairs * fact + self.questions * (1 + fact)

    @property
    def least_vocabulary(self) -> int:
        """Tokens that so many different facts take."""
        if self.kind == "mqar":
            return FIRST + DIGITS + 4 * self.pairs  # a quarter each for keys and values, the rest stands between
        return FIRST + DIGITS + 2 * max(self.pairs, PHRASE)

    @property
    def guessing_loss(self) -> float:
        """Nats a token of who knows the answers in the row, but not which question each belongs to; 0 for one fact.

        Of those that answer several questions each is crossed off when it was given. Answers that are equal by chance
        are counted as different.
        """
        nats = math.lgamma(self.questions + 1) if self.shape.all_asked else math.log(self.pairs)
        return nats / (self.questions * self.shape.answer)

    def guessing(self, rows: int, seed: int) -> float:
        """Share of the questions that such a guesser answers rightly, in so many rows of the stream of a seed."""
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1.")
        right = 0
        for index in range(rows):
            rng = _stream(seed, index)
            _, answers, _ = self._words(rng)
            left = Counter(map(tuple, answers.tolist()))
            for answer in map(tuple, answers[self._asked(rng)].tolist()):
                right += max(left, key=left.__getitem__) == answer
                left[answer] -= 1
        return right / (rows * self.questions)

    def _asked(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.pairs)[: self.questions]

    def sample(self, seed: int, index: int, language: "Language | None" = None) -> "RecallSample":
        """Row `index` of the stream of a seed; in the tokens of a language, if one is given."""
        rng = _stream(seed, index)
        cues, answers, filler = self._words(rng)
        asked = self._asked(rng)
        facts = np.concatenate((cues, answers), axis=1)
        questions = np.insert(facts[asked], 0, QUESTION, axis=1)
        room = self.length - self.least_length
        between = filler(room)
        begin = BEGIN
        if language is not None:
            language.check(self)
            begin, facts, questions = (language.words[ids] for ids in (begin, facts, questions))
            asked_by = language.words[np.unique(np.concatenate((cues.flatten(), [MARK, QUESTION])))]
            between = language.text_at(rng, room, without=asked_by)
        context = self._laid_out(rng, facts, between)
        ids = np.concatenate(([begin], context, questions.flatten())).astype(np.int64)
        labels = np.full(self.length, IGNORED)
        answer = slice(1 + self.shape.cue, None)
        labels[1 + len(context) :].reshape(questions.shape)[:, answer] = questions[:, answer]
        return RecallSample(ids, labels, 1 + len(context))

    def _words(self, rng: np.random.Generator):
        """Cues (pairs, cue), answers (pairs, answer), and a function that gives so many tokens to stand between."""
        digits, others = np.arange(FIRST, FIRST + DIGITS), np.arange(FIRST + DIGITS, self.vocab_size)
        if self.kind == "mqar":
            keys, values, *rest = np.array_split(others, 4)
            others = np.concatenate(rest)
            cues = rng.choice(keys, self.pairs, replace=False)[:, None]
            return cues, rng.choice(values, (self.pairs, 1)), lambda n: rng.choice(others, n)
        answers = rng.choice(digits, (self.pairs, self.shape.answer))
        if self.kind == "passkey":
            phrase = rng.choice(others, PHRASE)
            return np.full((1, 1), MARK), answers, lambda n: np.resize(phrase, n)
        # few names of each kind, so that neither the first nor the last one tells whose number it is
        firsts, lasts = np.array_split(others, 2)
        some = max(2, -(-self.pairs // 2))
        firsts, lasts = rng.choice(firsts, some, replace=False), rng.choice(lasts, some, replace=False)
        chosen = rng.permutation(some * some)[: self.pairs]
        names = np.stack((firsts[chosen // some], lasts[chosen % some]), axis=1)
        unsaid = np.setdiff1d(others, names)
        return names, answers, lambda n: rng.choice(unsaid, n)

    def _laid_out(self, rng: np.random.Generator, facts: np.ndarray, filler: np.ndarray) -> np.ndarray:
        """Facts (pairs, tokens of a fact) and filler in one row, the facts at their place."""
        room, (pairs, width) = len(filler), facts.shape
        if self.place == "spread":
            cuts = np.sort(rng.integers(0, room + 1, pairs))
        else:
            cuts = np.full(pairs, {"early": 0, "middle": room // 2, "late": room}[self.place])
        at = (cuts + width * np.arange(pairs))[:, None] + np.arange(width)
        is_filler = np.ones(room + facts.size, dtype=bool)
        is_filler[at] = False
        row = np.empty(room + facts.size, np.int64)
        row[at], row[is_filler] = facts, filler
        return row


@dataclass(frozen=True, kw_only=True)
class CopyTask:
    """A piece of random words, other words, and the piece again: each of its words but the first is to be predicted.

    What recall takes is to find where something stood before and to name what came after it. Here nearly half of a row
    is such questions, and nothing but finding the place helps to answer them.

    Raises:
        ValueError: the row is shorter than two pieces of two words.
    """

    length: int
    """Tokens of a row. A piece has a quarter to a half of them."""
    vocab_size: int = 512

    def __post_init__(self) -> None:
        if self.length < 8:
            raise ValueError(
                f"length={self.length} must be at least 8: a piece of two words twice, and others between."
            )
        if self.vocab_size <= FIRST + DIGITS:
            raise ValueError(f"vocab_size={self.vocab_size} must be above {FIRST + DIGITS}, or there are no words.")

    @property
    def guessing_loss(self) -> float:
        """0: nothing is known of an answer who does not find its place."""
        return 0.0

    def sample(self, seed: int, index: int, language: "Language | None" = None) -> "RecallSample":
        """Row `index` of the stream of a seed; in the words of a language, if one is given."""
        rng = _stream(seed, index)
        ids = rng.integers(FIRST + DIGITS, self.vocab_size, self.length)
        ids[0] = BEGIN
        piece = int(rng.integers(self.length // 4, (self.length - 1) // 2 + 1))
        ids[-piece:] = ids[1 : 1 + piece]
        if language is not None:
            language.check(self)
            ids = language.words[ids]
        labels = np.full(self.length, IGNORED)
        labels[1 - piece :] = ids[1 - piece :]
        return RecallSample(ids, labels, self.length - piece)


def _stream(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, 7], np.uint64), counter=[0, index, 0, 0]))


@dataclass(frozen=True)
class Language:
    """The tokens of a tokenizer in the place of the task's own, and real text between the facts.

    Attributes:
        words: (n,) the tokenizer's id for each of the task's ids.
        text: (m,) ids of a text.
    """

    words: np.ndarray
    text: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, text: np.ndarray, seed: int = 0) -> "Language":
        """Digits and marks as they are, where the vocabulary has them, words of the text that are one token as words
        and in the place of what is missing, in an order of the seed, and this text.

        Raises:
            ValueError: the text has few such words.
        """
        vocabulary = tokenizer.get_vocab()
        special = set(tokenizer.all_special_ids)
        # a token that a continuation follows is a beginning of a word, and no word
        goes_on = {id for token, id in vocabulary.items() if token.startswith("##")}
        ends_here = ~np.isin(np.append(text[1:], -1), list(goes_on))
        spoken = set(np.unique(text[ends_here]).tolist()) - special
        whole = sorted(id for word, id in vocabulary.items() if word.isalpha() and len(word) > 3 and id in spoken)
        if len(whole) < LEAST_WORDS:
            raise ValueError(
                f"the text has {len(whole)} words of more than three letters that are one token: recall takes "
                f"{LEAST_WORDS}."
            )
        words = np.random.default_rng(seed).permutation(whole)
        marks = [tokenizer.pad_token_id, tokenizer.cls_token_id]
        for signs in (".", ":", "0123456789"):
            if set(signs) <= vocabulary.keys():
                marks += [vocabulary[sign] for sign in signs]
            else:
                marks += words[: len(signs)].tolist()
                words = words[len(signs) :]
        return cls(np.concatenate((np.array(marks, np.int64), words.astype(np.int64))), text)

    @property
    def highest(self) -> int:
        """The highest id that its rows can hold."""
        return int(max(self.words.max(), self.text.max()))

    @property
    def digest(self) -> str:
        """SHA-256 of words and text, in hexadecimal."""
        return hashlib.sha256(self.words.tobytes() + self.text.tobytes()).hexdigest()

    def check(self, task: RecallTask | CopyTask) -> None:
        """Raise ValueError where the task has more words than the language, or its rows are longer than the text."""
        if task.vocab_size > len(self.words):
            raise ValueError(f"vocab_size={task.vocab_size} is over the {len(self.words)} words of the language.")
        if task.length > len(self.text):
            raise ValueError(f"the text of {len(self.text)} tokens is shorter than a row of {task.length}.")

    def text_at(self, rng: np.random.Generator, length: int, without: np.ndarray) -> np.ndarray:
        """So many tokens of the text, from anywhere on; other words in the place of those that it must not hold."""
        start = int(rng.integers(0, len(self.text) - length + 1))
        text = self.text[start : start + length]
        others = np.setdiff1d(self.words[FIRST + DIGITS :], without)
        return np.where(np.isin(text, without), rng.choice(others, length), text)


@dataclass(frozen=True)
class RecallSample:
    """One row: ids and labels (length,), −100 everywhere but at the answers; and where the questions begin."""

    ids: np.ndarray
    labels: np.ndarray
    questions_begin: int


class RecallDataset(Dataset[dict[str, torch.Tensor]]):
    """``dataset[index] -> {"input_ids", "labels", "segments"}``, each (length,); segment 1 is that of the questions."""

    def __init__(self, task: RecallTask | CopyTask, rows: int, seed: int, language: Language | None = None) -> None:
        self.task, self.rows, self.seed, self.language = task, rows, seed, language

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        sample = self.task.sample(self.seed, index, self.language)
        segments = (np.arange(len(sample.ids)) >= sample.questions_begin).astype(np.int64)
        arrays = {"input_ids": sample.ids, "labels": sample.labels, "segments": segments}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def answers_right(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Whether each answer is right in all of its tokens, in row order: (answers,) bool.

    An answer is a run of labels; each of its tokens is predicted from the one before it.
    """
    right_BL = torch.zeros_like(labels_BL, dtype=torch.bool)
    right_BL[:, 1:] = logits_BLV[:, :-1].argmax(-1) == labels_BL[:, 1:]
    is_answer_BL = labels_BL != IGNORED
    begins_BL = is_answer_BL.clone()
    begins_BL[:, 1:] &= ~is_answer_BL[:, :-1]
    answer_BL = begins_BL.flatten().cumsum(0).view_as(labels_BL) - 1
    wrong = answer_BL[is_answer_BL & ~right_BL]
    answers = torch.ones(int(begins_BL.sum()), dtype=torch.bool, device=labels_BL.device)
    answers[wrong] = False
    return answers
