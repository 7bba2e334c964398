"""Text in files, folders, globs and Hugging Face data sets, read as one stream of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

from mabert.data.formats import Row, file_kind, read_jsonl, read_lines, read_parquet, require_columns

Sources = str | Path | Sequence[str | Path]

SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")

# CHOICE: a text file without empty lines would be one endless document; it is cut between paragraphs at this length
MAX_DOCUMENT_CHARS = 2**23


class CorpusError(ValueError):
    """A corpus that cannot be read; the message says which file and line, and what to do."""


class Corpus:
    """The documents of ``sources``, in order; can be iterated more than once and never holds a whole file.

    A source is a file (``.txt .jsonl .parquet``; the first two also ``.gz`` or ``.xz``), a folder (its files of these
    kinds, sorted, hidden ones left out), a glob, or ``hf://owner/name?config=…&split=…&column=…`` for a data set of
    the Hugging Face hub or of a local folder. A file that several sources match is read once.

    In text files a line is a paragraph and an empty line parts documents; elsewhere a row's ``text_column`` is a
    document. Documents without a visible character are left out.

    ``sources``: the files and ``hf://`` addresses found. ``fraction``: the part of the bytes that the current
    iteration has read, or None where nobody can know it (``hf://``).
    """

    def __init__(self, sources: Sources, *, text_column: str = "text") -> None:
        named = [sources] if isinstance(sources, str | Path) else sources
        self.sources: list[Path | str] = list(dict.fromkeys(found for source in named for found in _find(source)))
        if not self.sources:
            raise CorpusError("no source of text was given")
        self.text_column = text_column
        self._bytes = {source: source.stat().st_size for source in self.sources if isinstance(source, Path)}
        self._bytes_done = 0
        self._open_file: BinaryIO | None = None

    @property
    def fraction(self) -> float | None:
        """Part of the bytes read so far, 0 to 1; None with an ``hf://`` source."""
        if len(self._bytes) < len(self.sources):
            return None
        in_file = self._open_file.tell() if self._open_file and not self._open_file.closed else 0
        return (self._bytes_done + in_file) / max(1, sum(self._bytes.values()))

    def __iter__(self) -> Iterator[str]:
        self._bytes_done, empty = 0, True
        for source in self.sources:
            for document in self._read(source):
                if document and not document.isspace():
                    empty = False
                    yield document
        if empty:
            raise CorpusError(f"the corpus is empty: no text in {', '.join(map(str, self.sources))}")

    def _read(self, source: Path | str) -> Iterator[str]:
        if isinstance(source, str):
            yield from _read_hub(source, self.text_column)
            return
        with source.open("rb") as file:
            self._open_file = file
            if file_kind(source) == ".parquet":
                rows = read_parquet(file, CorpusError, [self.text_column])
                yield from (_text(row, self.text_column) for row in rows)
            elif file_kind(source) == ".jsonl":
                yield from (_text(row, self.text_column) for row in read_jsonl(file, CorpusError))
            else:
                yield from _join_paragraphs(line for _, line in read_lines(file, CorpusError))
        self._bytes_done += self._bytes[source]


def iter_documents(sources: Sources, *, text_column: str = "text") -> Iterator[str]:
    """Yield the documents of ``sources`` (see `Corpus`); sources that do not exist are refused at once."""
    return iter(Corpus(sources, text_column=text_column))


def _find(source: str | Path) -> list[Path | str]:
    if isinstance(source, str) and source.startswith("hf://"):
        return [source]
    if not str(source):
        raise CorpusError("a source of text is the empty string; name a file, a folder or a glob")
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise CorpusError(f"{path}: unknown kind of file; known are {' '.join(SUFFIXES)}")
        return [path]
    anchor = path if path.is_dir() else Path(path.anchor)
    pattern = "**/*" if path.is_dir() else str(path.relative_to(anchor))
    files = sorted(match for match in anchor.glob(pattern) if match.is_file() and match.name.endswith(SUFFIXES))
    if path.is_dir():  # a glob can ask for hidden files, in a folder they are nobody's text
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files and not path.is_dir():
        raise CorpusError(f"{source}: no such file or folder, and no {' '.join(SUFFIXES)} file matches it as a glob")
    if not files:
        raise CorpusError(f"{source}: no file in this folder ends in {' '.join(SUFFIXES)}")
    return list(files)


def _join_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraphs: list[str] = []
    chars = 0
    for line in lines:
        paragraph = line.strip()
        if paragraph:
            paragraphs.append(paragraph)
            chars += len(paragraph)
        if paragraphs and (not paragraph or chars >= MAX_DOCUMENT_CHARS):
            yield "\n".join(paragraphs)
            paragraphs, chars = [], 0
    if paragraphs:
        yield "\n".join(paragraphs)


def _read_hub(address: str, text_column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as cause:
        raise ImportError(f"{address} needs the datasets library: pip install 'mabert[train]'") from cause
    name, _, query = address.removeprefix("hf://").partition("?")
    options = dict(parse_qsl(query))
    if unknown := sorted(options.keys() - {"config", "split", "column"}):
        raise CorpusError(f"{address}: unknown option {', '.join(unknown)}; known are config, split and column")
    split = options.get("split", "train")
    try:
        rows = load_dataset(name, options.get("config"), split=split, streaming=True)
    except (OSError, ValueError) as cause:
        raise CorpusError(f"{address} cannot be opened: {cause}") from cause
    for number, row in enumerate(rows, start=1):
        yield _text((f"{address}, row {number}", row), options.get("column", text_column))


def _text(row: Row, column: str) -> str:
    where, values = row
    require_columns(values, [column], where, CorpusError)
    value = values[column]
    if not isinstance(value, str):
        raise CorpusError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value
