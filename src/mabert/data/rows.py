"""Rows of exactly L tokens, without a pad, cut from shards."""

from __future__ import annotations

from typing import Literal

import numpy as np

from mabert.data.shards import Shards

Packing = Literal["documents", "full-sentences"]


class Rows:
    """Row i: ``rows[i] -> (ids (L,) int64, seq_idx (L,) int32)``. ``dropped_tokens``: in no row."""

    dropped_tokens: int

    def __init__(self, shards: Shards, length: int, packing: Packing = "documents") -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError
