"""Lines of text from plain or compressed files, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO


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


def _decompressed(file: BinaryIO) -> Iterable[bytes]:
    if file.name.endswith(".gz"):
        return gzip.open(file)
    if file.name.endswith(".xz"):
        return lzma.open(file)
    return file
