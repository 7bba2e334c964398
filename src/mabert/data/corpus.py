"""Text in files, folders, globs and Hugging Face data sets, read as one stream of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

Sources = str | Path | Sequence[str | Path]


class CorpusError(ValueError):
    """A corpus that cannot be read; the message says which file and line, and what to do."""


class Corpus:
    """The documents of ``sources``, in order; can be iterated more than once.

    ``fraction`` is the part of the bytes read by the current iteration, or None where nobody can know it (``hf://``).
    """

    sources: list[Path | str]
    fraction: float | None

    def __init__(self, sources: Sources, *, text_column: str = "text") -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError


def iter_documents(sources: Sources, *, text_column: str = "text") -> Iterator[str]:
    """Yield the documents of ``sources`` one by one."""
    return iter(Corpus(sources, text_column=text_column))
