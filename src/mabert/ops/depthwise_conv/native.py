"""The depthwise convolution on a CPU through the compiled kernel; see native.cpp."""

import torch
from torch import Tensor

from mabert.ops.native import DTYPES, boundaries, flat, kernels, like, rows, threads


def forward(x, weight, bias, mask, cu_seqlens, left, silu) -> Tensor:
    """See `reference.depthwise_conv`."""
    arguments, _keep_alive = _common(x, weight, bias, mask, cu_seqlens, left, silu)
    y = like(x)
    kernels.conv_forward(*arguments, rows("y", y, x.dtype), threads())
    return y


def backward(dy, x, weight, bias, mask, cu_seqlens, left, silu) -> list[Tensor]:
    """Gradients of x, weight and bias; an empty tensor for a bias that is absent."""
    arguments, _keep_alive = _common(x, weight, bias, mask, cu_seqlens, left, silu)
    dx, dy = like(x), dy.contiguous()
    dweight_WE, dbias_E = torch.zeros(weight.shape[::-1]), torch.zeros(weight.shape[0])
    kernels.conv_backward(
        *arguments,
        rows("dy", dy, x.dtype),
        rows("dx", dx, x.dtype),
        flat("dweight", dweight_WE),
        flat("dbias", dbias_E),
        threads(),
    )
    dbias = x.new_empty(0) if bias is None else dbias_E.to(bias.dtype)
    return [dx, dweight_WE.T.contiguous().to(weight.dtype), dbias]


def _common(x, weight, bias, mask, cu_seqlens, left, silu):
    """The arguments that forward and backward share, and what must outlive the call."""
    if x.dtype not in DTYPES:
        raise ValueError(f"native kernel: x must be float32 or bfloat16, not {x.dtype}. Use backend='torch'.")
    if weight.shape[1] > kernels.MAX_WIDTH:
        raise ValueError(
            f"native kernel: at most {kernels.MAX_WIDTH} taps, not {weight.shape[1]}. Use backend='torch'."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"native kernel: {name} must be float32 or {x.dtype}, not {tensor.dtype}.")
    batch, length, inner = x.shape
    units = batch
    if cu_seqlens is not None:
        cu_seqlens, lengths = boundaries(cu_seqlens, length)
        units = len(lengths)
    weight_WE = weight.T.float().contiguous()
    bias = None if bias is None else bias.float()
    mask = None if mask is None else mask.contiguous()
    arguments = (
        (batch, length, inner),
        weight.shape[1],
        left,
        units,
        flat("cu_seqlens", cu_seqlens, torch.int32),
        flat("mask", mask, torch.bool),
        x.dtype == torch.bfloat16,
        silu,
        rows("x", x, x.dtype),
        flat("weight", weight_WE),
        flat("bias", bias),
    )
    return arguments, (cu_seqlens, mask, weight_WE, bias)
