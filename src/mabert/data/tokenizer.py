"""A WordPiece tokenizer exactly as BERT's: trained, loaded, and told apart by a hash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import BertTokenizer, PreTrainedTokenizerFast


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or used; the message says why and what to do."""


def train_tokenizer(
    documents: Iterable[str],
    *,
    vocab_size: int = 30522,
    lowercase: bool = True,
    min_frequency: int = 2,
    model_max_length: int = 512,
    show_progress: bool = False,
) -> BertTokenizer:
    """Train a WordPiece tokenizer; ``save_pretrained(folder)`` saves it."""
    raise NotImplementedError


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer in ``folder``; a missing one, or one without mask, cls, sep or pad token, is refused."""
    raise NotImplementedError


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a sha256 (64 hex digits) of what decides the token ids: the same before saving and after loading."""
    raise NotImplementedError
