"""Tokenised text on disk: memory-mapped token ids, document boundaries and a manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from mabert.data.corpus import Sources

Progress = Callable[[float | None, int, int], None]
"""Called as ``progress(fraction_read or None, documents, tokens)`` after every batch."""


class ShardsError(ValueError):
    """Shards that are missing, incomplete, corrupt, or made from something else."""


class Shards:
    """Tokenised documents, memory-mapped (no special tokens in them).

    n_documents, n_tokens: int. vocab_size, cls_token_id, sep_token_id: int. tokenizer_hash: str.
    document_starts, document_lengths: (n_documents,) int64.
    """

    n_documents: int
    n_tokens: int
    vocab_size: int
    cls_token_id: int
    sep_token_id: int
    tokenizer_hash: str
    document_starts: np.ndarray
    document_lengths: np.ndarray

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        raise NotImplementedError

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` to ``stop`` of the whole stream, (stop − start,), uint16 or uint32."""
        raise NotImplementedError

    @property
    def unigram_counts(self) -> np.ndarray:
        """How often each token id occurs, (vocab_size,) int64."""
        raise NotImplementedError

    def split(self, valid_fraction: float, seed: int) -> tuple[Shards, Shards]:
        """Part the documents into (train, held-out); the held-out ones hold about ``valid_fraction`` of the tokens."""
        raise NotImplementedError


def build_shards(
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    text_column: str = "text",
    shard_tokens: int = 2**26,
    progress: Progress | None = None,
) -> Shards:
    """Tokenise ``sources`` once into a new ``folder``."""
    raise NotImplementedError


def prepare_shards(
    sources: Sources,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    text_column: str = "text",
    shard_tokens: int = 2**26,
    progress: Progress | None = None,
) -> Shards:
    """Open the shards in ``folder`` if they were made from the same sources with the same tokenizer, else build them."""
    raise NotImplementedError


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that the counts describe: the loss of a model that knows no context."""
    raise NotImplementedError
