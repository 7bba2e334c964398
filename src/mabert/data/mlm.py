"""Masked language modelling: BERT's 80/10/10, with randomness that depends on the sample's place alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from mabert.data.rows import Rows

Key = tuple[int, int, int]


def mask_tokens(
    ids: np.ndarray,
    maskable: np.ndarray,
    *,
    mask_token_id: int,
    replacements: np.ndarray,
    mlm_probability: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (input_ids, labels), both like ``ids``; labels are −100 where nothing was selected."""
    raise NotImplementedError


def permuted_index(seed: int, stage: int, epoch: int, n: int) -> np.ndarray:
    """Return the order in which one epoch of a stage visits its n rows: a permutation, (n,) int64."""
    raise NotImplementedError


class MlmDataset(Dataset):
    """``dataset[(stage, epoch, index)] -> {input_ids, seq_idx, labels}``; an int i means (0, 0, i): fixed masks."""

    def __init__(
        self,
        stages: Sequence[Rows],
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        mlm_probability: float = 0.15,
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: Key | int) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def collate_rows(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples of equal length: each entry becomes (B, L)."""
    raise NotImplementedError


class MlmCollator:
    """Pad tokenised examples and mask them, for plain ``datasets`` and Trainer; attention_mask is kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mlm_probability: float = 0.15, seed: int = 0) -> None:
        raise NotImplementedError

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        raise NotImplementedError
