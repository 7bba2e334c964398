"""Tokenised text on disk: memory-mapped token ids, document boundaries and a manifest."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from mabert.data.corpus import Corpus, Sources
from mabert.data.tokenizer import tokenizer_hash
from mabert.files import atomic_folder

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, OFFSETS = "manifest.json", "document_offsets.npy"
BATCH_CHARS = 2**20  # a batch of encodings takes about a hundred times this many bytes

Progress = Callable[[float | None, int, int], None]
"""Called as ``progress(fraction_read or None, documents, tokens)`` after every batch."""


class ShardsError(ValueError):
    """Shards that are missing, incomplete, corrupt, or made from something else."""


class Shards:
    """Tokenised documents in a folder, memory-mapped; there are no special tokens in them.

    manifest: what the folder was made from and holds. document_starts, document_lengths: (n_documents,) int64, where
    in the stream of all tokens a document begins and how many it has. A document lies in one file.

    Given a ``tokenizer``, shards that another one made are refused (ShardsError), as are missing or damaged ones.
    """

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if tokenizer is not None and (wanted := tokenizer_hash(tokenizer)) != self.tokenizer_hash:
            raise ShardsError(
                f"{self.folder} was made with another tokenizer (its hash is {self.tokenizer_hash}, "
                f"the given one's {wanted}): use that tokenizer, or build the shards anew in another folder"
            )
        counts = [shard["tokens"] for shard in self.manifest["shards"]]
        self._file_starts = np.cumsum([0, *counts])
        offsets = np.load(self.folder / OFFSETS)
        self.document_starts, self.document_lengths = offsets[:-1], np.diff(offsets)
        self._open_files: dict[int, np.ndarray] = {}

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.document_lengths)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in these documents."""
        return int(self.document_lengths.sum())

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, special tokens included."""
        return self.manifest["vocab_size"]

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer that made the shards."""
        return self.manifest["tokenizer_hash"]

    @property
    def cls_token_id(self) -> int:
        """Id of [CLS]."""
        return self.manifest["cls_token_id"]

    @property
    def sep_token_id(self) -> int:
        """Id of [SEP]."""
        return self.manifest["sep_token_id"]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` of the stream of all tokens: (stop − start,) uint16 or uint32, read-only."""
        if not 0 <= start <= stop <= self._file_starts[-1]:
            raise IndexError(f"tokens {start} to {stop} of {self._file_starts[-1]}")
        first = int(np.searchsorted(self._file_starts[1:-1], start, side="right"))
        begin, end = self._file_starts[first : first + 2].tolist()
        if stop <= end:
            return self._file(first)[start - begin : stop - begin]
        return np.concatenate([self._file(first)[start - begin :], self.tokens(end, stop)])

    def split(self, valid_fraction: float, seed: int) -> tuple[Shards, Shards]:
        """Part the documents into (train, held-out).

        The held-out ones are drawn at random, as many as come nearest to ``valid_fraction`` of the tokens, at least
        one; the same shards and seed always give the same ones.
        """
        if not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction={valid_fraction} must lie between 0 and 1")
        if self.n_documents < 2:
            raise ShardsError(
                f"{self.folder} holds one document: nothing can be held out; an empty line parts documents"
            )
        order = np.random.Generator(np.random.Philox(seed)).permutation(self.n_documents)
        tokens = self.document_lengths[order].cumsum()
        n_valid = 1 + int(np.abs(tokens[:-1] - valid_fraction * self.n_tokens).argmin())
        return self._of(np.sort(order[n_valid:])), self._of(np.sort(order[:n_valid]))

    def _of(self, documents: np.ndarray) -> Shards:
        part = copy.copy(self)
        part.document_starts = self.document_starts[documents]
        part.document_lengths = self.document_lengths[documents]
        return part

    def _file(self, index: int) -> np.ndarray:
        if index not in self._open_files:
            path = self.folder / self.manifest["shards"][index]["file"]
            self._open_files[index] = np.asarray(np.memmap(path, dtype=self.manifest["dtype"], mode="r"))
        return self._open_files[index]

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as its whole content; a spawned data loader's worker opens its own.
        return {**self.__dict__, "_open_files": {}}


def prepare_shards(
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    text_column: str = "text",
    shard_tokens: int = 2**26,
    progress: Progress | None = None,
) -> Shards:
    """Open the shards in ``folder`` if the same sources and tokenizer made them; build them if it is new or empty.

    Sources are the same if their content is. Anything else in ``folder`` is left alone and refused (ShardsError).
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        with suppress(FileExistsError):  # another process was quicker: its shards are as good, if they are the same
            return build_shards(
                sources, tokenizer, folder, text_column=text_column, shard_tokens=shard_tokens, progress=progress
            )
    shards = Shards(folder, tokenizer)
    known = shards.manifest["sources"]
    corpus = Corpus(sources, text_column=text_column)
    same = len(known) == len(corpus.sources) and all(map(_is_same_source, known, corpus.sources))
    if not same or shards.manifest["text_column"] != text_column:
        raise ShardsError(
            f"{folder} holds shards of other text ({', '.join(source['source'] for source in known)}): "
            "give another folder, or delete this one to build it anew"
        )
    logger.info("reusing %s: %d documents, %d tokens", folder, shards.n_documents, shards.n_tokens)
    return shards


def build_shards(
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    text_column: str = "text",
    shard_tokens: int = 2**26,
    progress: Progress | None = None,
) -> Shards:
    """Tokenise ``sources`` once into a new ``folder``, which appears when it is complete.

    A file is closed after the document that fills ``shard_tokens``. Documents without a token are left out.
    """
    corpus = Corpus(sources, text_column=text_column)
    vocab_size = len(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    offsets = array("q", [0])
    with atomic_folder(folder) as temporary:
        writer = _ShardWriter(temporary, dtype, shard_tokens)
        for documents in _tokenised(corpus, tokenizer, dtype):
            for ids in documents:
                writer.write(ids)
                offsets.append(offsets[-1] + len(ids))
            if progress is not None:
                progress(corpus.fraction, len(offsets) - 1, offsets[-1])
        writer.close()
        if offsets[-1] == 0:
            raise ShardsError(f"the tokenizer finds no token in {', '.join(map(str, corpus.sources))}")
        np.save(temporary / OFFSETS, np.asarray(offsets))
        manifest = {
            "format": FORMAT,
            "sources": [_describe(source) for source in corpus.sources],
            "text_column": text_column,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "vocab_size": vocab_size,
            "cls_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "dtype": dtype.str,
            "documents": len(offsets) - 1,
            "tokens": offsets[-1],
            "shards": writer.shards,
            "bytes": {file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Shards(folder)


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that the counts describe: the best loss of a model that knows no context."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class _ShardWriter:
    """Appends documents to numbered files of about ``shard_tokens`` tokens."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._file: BinaryIO | None = None

    def write(self, ids: np.ndarray) -> None:
        if self._file is None:
            self.shards.append({"file": f"tokens-{len(self.shards):05d}.bin", "documents": 0, "tokens": 0})
            self._file = (self._folder / self.shards[-1]["file"]).open("wb")
        self._file.write(ids.tobytes())
        shard = self.shards[-1]
        shard["documents"] += 1
        shard["tokens"] += len(ids)
        if shard["tokens"] >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _tokenised(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, dtype: np.dtype
) -> Iterator[list[np.ndarray]]:
    """Yield the token ids of the documents, batch by batch; no batch is empty, no document either."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()  # an earlier call of the tokenizer leaves its own settings there
    backend.no_padding()
    backend.encode_special_tokens = True  # a text that speaks of "[MASK]" has four characters there, not a mask
    for batch in _batches(documents):
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype) for encoding in encodings if len(encoding)]
        if ids:
            yield ids


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and compare the files with it."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ShardsError(
            f"{folder} holds no complete shards ({MANIFEST} is missing): build them, or name their folder"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise ShardsError(f"{path} is damaged ({cause}): delete {folder} and build the shards anew") from cause
    if manifest.get("format") != FORMAT:
        raise ShardsError(
            f"{folder} has format {manifest.get('format')}, this version of mabert reads {FORMAT}: build it anew"
        )
    for name, size in manifest["bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise ShardsError(f"{folder} is damaged: {name} {state}; delete the folder and build the shards anew")
    return manifest


def _describe(source: Path | str) -> dict[str, Any]:
    if isinstance(source, str):
        return {"source": source}
    stat = source.stat()
    return {
        "source": str(source.resolve()),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": _sha256(source),
    }


def _is_same_source(known: dict[str, Any], source: Path | str) -> bool:
    """Compare by name, size and time; where these differ, as after copying, by content."""
    if isinstance(source, str) or "sha256" not in known:
        return known == {"source": source}
    stat = source.stat()
    if stat.st_size != known["bytes"]:
        return False
    untouched = str(source.resolve()) == known["source"] and stat.st_mtime_ns == known["mtime_ns"]
    return untouched or _sha256(source) == known["sha256"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
