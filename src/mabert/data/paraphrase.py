"""Text for continual training on paraphrases: a passage, a gap, and the passage in other words, in one document.

After arXiv 2510.26912, of which the idea is known and not the settings. Controls hold everything but the paraphrase:
the passage word for word, another passage, or passage and paraphrase in two documents.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mabert.data.formats import read_lines
from mabert.data.tables import TableError, read_table

KINDS = ("paraphrase", "verbatim", "unrelated", "apart", "none")
"""What follows the passage: its paraphrase; itself; another passage; its paraphrase, but in another document; or no
such documents at all."""
ORDERS = ("passage-first", "paraphrase-first", "either")
NAMES = (("sentence1", "sentence2"), ("passage", "paraphrase"))
"""Columns of a passage and its paraphrase, wherever they stand."""
NO_TEXTS = {"label", "id", "idx", "index"}
SENTENCE_SPLIT = " <::::> "  # WikiSplit's mark between two sentences

Pair = tuple[str, str]


def read_pairs(paths: Sequence[str | Path]) -> list[Pair]:
    """Passages with their paraphrases, from tables with a header: the columns `sentence1` and `sentence2`, or `passage`
    and `paraphrase`, or the first two.

    Where there is a column `label`, only rows with 1 in it are taken. WikiSplit's mark between two sentences becomes a
    space.

    Raises:
        TableError: a file is missing or empty, has no two columns for them, or a text is empty; the message names it.
    """
    pairs: list[Pair] = []
    labels: set[str] = set()
    for path in map(Path, paths):
        columns = _header(path)
        has_label = "label" in columns
        table = read_table(path, text_columns=_texts(path, columns), label_column="label" if has_label else None)
        names = table.label_names or ()
        labels.update(names)
        for index, texts in enumerate(zip(table.texts, table.pairs or (), strict=True)):
            passage, paraphrase = map(_plain, texts)
            if not passage or not paraphrase:
                raise TableError(f"{path}, row {index + 1}: a text is empty: delete the row, or fill it")
            if not has_label or names[int((table.labels or ())[index])] == "1":
                pairs.append((passage, paraphrase))
    if not pairs:
        only = f": of the labels {', '.join(sorted(labels))} only 1 says that there is one" if labels else ""
        raise TableError(f"{', '.join(map(str, paths)) or 'no file'}: no pair of a passage and its paraphrase{only}")
    return pairs


def _texts(path: Path, columns: Sequence[str]) -> list[str]:
    """The two columns of a header that hold the texts."""
    texts = next((list(names) for names in NAMES if set(names) <= set(columns)), list(columns[:2]))
    if len(set(texts) - NO_TEXTS) < 2:
        raise TableError(
            f"{path}, line 1: two columns of text are needed, a passage and its paraphrase, first or by the names "
            f"{' or '.join(' and '.join(names) for names in NAMES)}, not {', '.join(columns)}"
        )
    return texts


def _header(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            first = next(read_lines(file, TableError), None)
    except FileNotFoundError as cause:
        raise TableError(f"{path} does not exist") from cause
    if first is None:
        raise TableError(f"{path} is empty: it holds no row")
    return first[1].split("\t")


def _plain(text: str) -> str:
    return " ".join(text.replace(SENTENCE_SPLIT, " ").split())


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How documents are made of pairs, and how much of the text they are.

    Raises:
        ValueError: there is no such kind or order, or a number is out of its range.
    """

    kind: str = "paraphrase"
    order: str = "passage-first"
    ratio: float = 0.25
    """Share of the words of the text; the rest is unmodified text."""
    gap: tuple[int, int] = (0, 30)
    """Words of other passages between the two, from so many to so many."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}.")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not one of {', '.join(ORDERS)}.")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be above 0 and at most 1.")
        bounds = self.gap if isinstance(self.gap, list | tuple) else ()
        whole = len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds)
        if not whole or not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"gap={self.gap} must be two numbers of words that grow, from 0 on.")

    def documents(self, pairs: Sequence[Pair], turn: int = 0) -> Iterator[str]:
        """Documents of pairs, all of them once, in an order of the seed.

        Args:
            turn: how often they came before; the next time order, gaps and controls are others.

        Raises:
            ValueError: there are fewer than three pairs.
        """
        if len(pairs) < 3:
            raise ValueError(f"{len(pairs)} pairs are too few: gaps and controls are made of other passages.")
        rng = random.Random(f"{self.seed}-{turn}")
        for index in rng.sample(range(len(pairs)), len(pairs)):
            passage, paraphrase = pairs[index]
            gap, other = self._gap(rng, pairs, index), pairs[_other(rng, len(pairs), index)][0]
            swap = self.order == "paraphrase-first" or (self.order == "either" and rng.random() < 0.5)
            if self.kind == "verbatim":
                paraphrase = passage
            elif self.kind == "unrelated":
                paraphrase = other
            first, second = (paraphrase, passage) if swap else (passage, paraphrase)
            if self.kind == "apart":
                yield from (first, " ".join(filter(None, (gap, second))))
            else:
                yield " ".join(filter(None, (first, gap, second)))

    def _gap(self, rng: random.Random, pairs: Sequence[Pair], index: int) -> str:
        words: list[str] = []
        wanted = rng.randint(*self.gap)
        while len(words) < wanted:
            words += pairs[_other(rng, len(pairs), index)][0].split()
        return " ".join(words[:wanted])

    def mixed(self, pairs: Sequence[Pair], text: Sequence[str], words: int) -> list[str]:
        """So many words of documents: `ratio` of them made of pairs, which come again where they do not suffice, the
        rest taken from anywhere in `text`, none twice; shuffled. With one seed every kind has the same order of `text`.

        Raises:
            ValueError: the text has too few words, or there are fewer than three pairs to make documents of.
        """
        share = 0.0 if self.kind == "none" else self.ratio
        endless = (document for turn in itertools.count() for document in self.documents(pairs, turn))
        made = _take(endless, round(words * share)) if share else []
        order = random.Random(f"{self.seed}-text").sample(range(len(text)), len(text))
        plain = _take((text[index] for index in order), words - round(words * share))
        if sum(len(document.split()) for document in plain) < 0.9 * (words - round(words * share)):
            raise ValueError(f"the text has too few words for {words:,}, of which {1 - share:.0%} are unmodified text.")
        mixed = [*made, *plain]
        random.Random(self.seed).shuffle(mixed)
        return mixed


def _other(rng: random.Random, count: int, index: int) -> int:
    """Any of so many but this one."""
    return (index + rng.randrange(1, count)) % count


def _take(documents: Iterator[str], words: int) -> list[str]:
    taken, count = [], 0
    for document in documents:
        if count >= words:
            break
        taken.append(document)
        count += len(document.split())
    return taken
