"""Labelled tables: TSV, CSV, JSONL and parquet with one or two text columns and a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class TableError(ValueError):
    """A table that cannot be used; the message says which file and line, and what to do."""


@dataclass(frozen=True)
class Table:
    """Texts with their partners and labels.

    texts: the first text column. pairs: the second, or None. labels: the class of each row as an index into
    ``label_names``, or its number when the table was read for regression (``label_names`` is None then), or None
    without a label column.
    """

    path: Path
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[int] | list[float] | None = None
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def read_table(
    path: str | Path,
    *,
    text_columns: Sequence[str],
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    columns: Sequence[str] | None = None,
    skip_incomplete: bool = False,
) -> Table:
    """Read one table. ``labels`` fixes the classes and their order (else: those found, sorted)."""
    raise NotImplementedError
