"""What the Triton kernels share: where they can run, what they demand of a tensor, and sequences of packed rows.

Triton is imported when a kernel first runs, not with this module.
"""

import os
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INSTALLED = find_spec("triton") is not None
# Triton's interpreter runs the kernels on any device, slowly.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
# One row a program along an axis of the grid that CUDA bounds.
MOST_ROWS = 65535


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None when they can."""
    if device.type != "cuda" and not INTERPRETED:
        return f"it runs on GPUs, not on {device.type} (TRITON_INTERPRET=1 runs it anywhere, for tests)."
    if not INSTALLED:
        return "Triton is not installed: pip install triton."
    return None


def on_device_of_first(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run with the first argument's GPU as the current one: Triton launches there, wherever the tensors are."""

    @wraps(function)
    def run(tensor: Tensor, *others: object) -> Result:
        with torch.cuda.device_of(tensor):
            return function(tensor, *others)

    return run


def check_input(x: Tensor) -> None:
    """Refuse what no kernel takes as its x (B, L, E).

    Raises:
        ValueError: its dtype, or more rows than a grid has programs for.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"triton kernel: x must be float32, bfloat16 or float16, not {x.dtype}.")
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"triton kernel: at most {MOST_ROWS} rows, not {x.shape[0]}. Pack them, or split the batch.")


def rows(name: str, tensor: Tensor, like: Tensor) -> tuple[Tensor, int, int]:
    """A (B, L, F) tensor with its batch and time strides, as the kernels take it.

    Raises:
        ValueError: its dtype or device is not that of `like`, or its last dimension is not contiguous.
    """
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"triton kernel: {name} must be {like.dtype} on {like.device}, not {tensor.dtype} on {tensor.device}."
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"triton kernel: the last dimension of {name} must be contiguous, not of stride {tensor.stride(-1)}."
        )
    return tensor, tensor.stride(0), tensor.stride(1)


def sequence_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """The sequence of each token of a packed row: (L,) int32."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=torch.int32)
    # the last boundary is left out: tokens beyond wrong boundaries then still belong to a sequence that exists
    return torch.searchsorted(cu_seqlens[1:-1].contiguous(), tokens, right=True, out_int32=True)
