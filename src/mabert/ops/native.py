"""The compiled CPU kernels: whether they are there, and what they demand of a tensor."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mabert.ops.boundaries import check_boundaries

kernels: Any = None
missing_because = ""
try:
    kernels = import_module("mabert.ops._native")
except ImportError as error:
    missing_because = str(error)

DTYPES = (torch.float32, torch.bfloat16)
ABSENT = (0, 0, 0)


def like(tensor: Tensor) -> Tensor:
    """Uninitialised, of the same shape and dtype, contiguous."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()


def rows(name: str, tensor: Tensor | None, dtype: torch.dtype) -> tuple[int, int, int]:
    """Address, batch stride and time stride of a (B, L, F) tensor.

    Raises:
        ValueError: its dtype or device is not what the kernel reads, or its last dimension is not contiguous.
    """
    if tensor is None:
        return ABSENT
    _check(name, tensor, dtype)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"native kernel: the last dimension of {name} must be contiguous, not of stride {tensor.stride(-1)}."
        )
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def flat(name: str, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    """Address of a contiguous tensor, 0 for None.

    Raises:
        ValueError: its dtype or device is not what the kernel reads, or it is not contiguous.
    """
    if tensor is None:
        return 0
    _check(name, tensor, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"native kernel: {name} must be contiguous.")
    return tensor.data_ptr()


def boundaries(cu_seqlens: Tensor, length: int) -> tuple[Tensor, list[int]]:
    """The boundaries as the kernel reads them, and the length of each sequence.

    Raises:
        ValueError: they do not run from 0 to `length` without decreasing.
    """
    _check("cu_seqlens", cu_seqlens, torch.int32)
    check_boundaries(cu_seqlens, length)
    return cu_seqlens.contiguous(), cu_seqlens.diff().tolist()


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"native kernel: {name} must be on the CPU, not on {tensor.device}.")
    if tensor.dtype != dtype:
        raise ValueError(f"native kernel: {name} must be {dtype}, not {tensor.dtype}.")
