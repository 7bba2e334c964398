"""Lines, JSON objects and parquet rows of a file, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = tuple[str, dict[str, Any]]
"""Where it stands ("file, line n"), and its values by column."""


def read_lines(file: BinaryIO, error: type[ValueError]) -> Iterator[tuple[int, str]]:
    r"""Yield (line number from 1, line without its ``\n`` or ``\r\n``) of an opened ``.gz``, ``.xz`` or plain file.

    Raises ``error`` for what is cut off, damaged or not UTF-8.
    """
    number = 0
    try:
        # Split at \n alone: str.splitlines would also part a line at \x85 or \u2028, which real text holds.
        for number, line in enumerate(_decompressed(file), start=1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as cause:
        raise error(
            f"{file.name}, line {number}: not UTF-8 ({cause.reason} at byte {cause.start} of the line); "
            "convert the file first, for instance with `iconv -f latin1 -t utf-8`"
        ) from cause
    except EOFError as cause:
        raise error(f"{file.name} is truncated after line {number}: copy or download it again") from cause
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as cause:
        raise error(f"{file.name} is damaged after line {number} ({cause}): copy or download it again") from cause


def read_jsonl(file: BinaryIO, error: type[ValueError]) -> Iterator[Row]:
    """Yield the JSON objects of a file with one in each line; blank lines are passed over."""
    for number, line in read_lines(file, error):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as cause:
            raise error(f"{where}: not JSON ({cause.msg} at character {cause.pos})") from cause
        if not isinstance(row, dict):
            raise error(f"{where}: a JSON object was expected, not {type(row).__name__}")
        yield where, row


def read_parquet(file: BinaryIO, error: type[ValueError], columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of an opened parquet file, with these columns only."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as cause:
        raise ImportError(f"{file.name}: reading parquet needs pyarrow: pip install 'mabert[train]'") from cause
    try:
        table = parquet.ParquetFile(file)
        require_columns(table.schema_arrow.names, columns, file.name, error)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as cause:
        raise error(f"{file.name} is no complete parquet file ({cause}): copy or download it again") from cause


def file_kind(path: str | Path) -> str:
    """Return the suffix that says what a file is, such as ".jsonl" for "a.jsonl.gz"."""
    return Path(str(path).removesuffix(".gz").removesuffix(".xz")).suffix


def require_columns(known: Iterable[str], wanted: Iterable[str], where: str, error: type[ValueError]) -> None:
    """Raise ``error``, with the columns there are, if a wanted one is not among them."""
    if absent := [name for name in wanted if name not in known]:
        raise error(f"{where}: no column {absent[0]!r}; the columns are {', '.join(known) or '(none)'}")


def _decompressed(file: BinaryIO) -> Iterable[bytes]:
    if file.name.endswith(".gz"):
        return gzip.open(file)
    if file.name.endswith(".xz"):
        return lzma.open(file)
    return file
