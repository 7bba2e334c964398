"""Labelled tables: TSV, CSV, JSONL and parquet with one or two text columns and a label."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mabert.data.formats import Row, file_kind, read_jsonl, read_lines, read_parquet, require_columns

logger = logging.getLogger(__name__)

SUFFIXES = (*(kind + packed for kind in (".tsv", ".csv", ".jsonl") for packed in ("", ".gz", ".xz")), ".parquet")


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
    """Read one table; its suffix says how: ``.tsv .csv .jsonl``, also ``.gz`` or ``.xz``, and ``.parquet``.

    TSV knows no quotes: a field is what stands between two tabs, and every line has as many as the header; empty lines
    are passed over. CSV is quoted as usual. ``columns`` names the columns of a TSV or CSV file that has no header.
    ``labels`` fixes the classes and their order; without it they are those found, sorted, numbers by their value.
    ``regression`` reads numbers. ``skip_incomplete`` leaves out TSV lines with a wrong number of fields, with a
    warning, instead of refusing them.

    Raises TableError for a missing column, an empty table, text or a label that is missing, a label that is not among
    ``labels`` or no number.
    """
    path = Path(path)
    if not 1 <= len(text_columns) <= 2:
        raise ValueError(f"one or two text columns are needed, not {len(text_columns)}")
    wanted = [*text_columns, *([label_column] if label_column is not None else [])]
    texts: list[list[str]] = [[] for _ in text_columns]
    found: list[str] = []
    numbers: list[float] = []
    with _open(path) as file:
        for where, row in _read_rows(file, wanted, columns, skip_incomplete):
            require_columns(row, wanted, where, TableError)
            for column, name in zip(texts, text_columns, strict=True):
                if not isinstance(row[name], str):
                    raise TableError(f"{where}: column {name!r} holds {row[name]!r}, which is no text")
                column.append(row[name])
            if label_column is None:
                continue
            value = "" if row[label_column] is None else str(row[label_column]).strip()
            if not value:
                raise TableError(f"{where}: the label (column {label_column!r}) is empty")
            if labels is not None and value not in labels:
                raise TableError(f"{where}: label {value!r} is not one of {', '.join(labels)}")
            if regression:
                numbers.append(_number(value, where))
            else:
                found.append(value)
    if not texts[0]:
        raise TableError(f"{path} is empty: it holds no row")
    pairs = texts[1] if len(texts) == 2 else None
    if label_column is None:
        return Table(path, texts[0], pairs)
    if regression:
        return Table(path, texts[0], pairs, numbers)
    names = tuple(labels) if labels is not None else _sorted_labels(set(found))
    index = {name: i for i, name in enumerate(names)}
    return Table(path, texts[0], pairs, [index[value] for value in found], names)


def _open(path: Path) -> BinaryIO:
    if not path.name.endswith(SUFFIXES):
        raise TableError(f"{path}: unknown kind of table; known are {' '.join(SUFFIXES)}")
    try:
        return path.open("rb")
    except FileNotFoundError as cause:
        raise TableError(f"{path} does not exist") from cause


def _sorted_labels(names: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _number(value: str, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise TableError(f"{where}: label {value!r} is not a number, which regression needs")
    return number


def _read_rows(
    file: BinaryIO, wanted: Sequence[str], columns: Sequence[str] | None, skip_incomplete: bool
) -> Iterator[Row]:
    kind = file_kind(file.name)
    if kind == ".parquet":
        return read_parquet(file, TableError, wanted)
    if kind == ".jsonl":
        return read_jsonl(file, TableError)
    if kind == ".csv":
        return _read_csv(file, wanted, columns)
    return _read_tsv(file, wanted, columns, skip_incomplete)


def _read_tsv(
    file: BinaryIO, wanted: Sequence[str], columns: Sequence[str] | None, skip_incomplete: bool
) -> Iterator[Row]:
    skipped: list[int] = []
    for line, text in read_lines(file, TableError):
        if not text:
            continue
        fields = text.split("\t")
        if columns is None:
            columns = fields
            require_columns(columns, wanted, f"{file.name}, line {line}", TableError)
        elif len(fields) == len(columns):
            yield f"{file.name}, line {line}", dict(zip(columns, fields, strict=True))
        elif skip_incomplete:
            skipped.append(line)
        else:
            raise TableError(
                f"{file.name}, line {line}: {len(fields)} fields, but there are {len(columns)} columns "
                f"({', '.join(columns)}); a field of a .tsv file can hold neither a tab nor a line break"
            )
    if skipped:
        logger.warning("%s: left out %d lines without all fields, the first is %d", file.name, len(skipped), skipped[0])


def _read_csv(file: BinaryIO, wanted: Sequence[str], columns: Sequence[str] | None) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    reader = csv.reader((f"{text}\n" for _, text in read_lines(file, TableError)), strict=True)
    try:
        for fields in reader:
            if columns is None:
                columns = fields
                require_columns(columns, wanted, f"{file.name}, line {reader.line_num}", TableError)
            elif len(fields) == len(columns):
                yield f"{file.name}, line {reader.line_num}", dict(zip(columns, fields, strict=True))
            elif fields:
                raise TableError(
                    f"{file.name}, line {reader.line_num}: {len(fields)} fields, but there are {len(columns)} columns "
                    f"({', '.join(columns)}); a field that holds a comma needs quotes"
                )
    except csv.Error as cause:
        raise TableError(f"{file.name}, line {reader.line_num}: {cause}; is a quote missing or not doubled?") from cause
