"""Which tokens are real and where packed sequences begin and end: what every operation demands of both."""

from itertools import pairwise

import torch
from torch import Tensor


def check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    """Refuse a mask that is not a bool for every token.

    Raises:
        ValueError: its shape or dtype is another.
    """
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be torch.bool of shape {tuple(shape)}, not {mask.dtype} of {tuple(mask.shape)}.")


def check_boundaries(cu_seqlens: Tensor, length: int) -> None:
    """Refuse boundaries that do not part a row of `length` tokens.

    The values are looked at on a CPU only, and not while compiling: elsewhere that would wait for the device.

    Raises:
        ValueError: cu_seqlens is not (S+1,) int32 with S at least 0, or does not run from 0 to `length` without
            decreasing.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (S+1,) int32, not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}.")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(b < a for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must run from 0 to {length} without decreasing, not {ends}.")
