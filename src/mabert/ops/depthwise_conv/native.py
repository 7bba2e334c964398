"""The depthwise convolution on a CPU through the compiled kernel; see native.cpp."""

import torch
from torch import Tensor

from mabert.ops.native import DTYPES, boundaries, flat, kernels, like, rows, threads


def depthwise_conv(
    x_BLE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor | None,
    mask_BL: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """See `reference.depthwise_conv`."""
    return _conv(x_BLE, weight_EW, bias_E, mask_BL, cu_seqlens, left, silu)


@torch.library.custom_op("mabert::depthwise_conv", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    arguments, _keep_alive = _common(x, weight, bias, mask, cu_seqlens, left, silu)
    y = like(x)
    kernels.conv_forward(*arguments, rows("y", y, x.dtype), threads())
    return y


@_conv.register_fake
def _(x, weight, bias, mask, cu_seqlens, left, silu) -> Tensor:
    return like(x)


@torch.library.custom_op("mabert::depthwise_conv_backward", mutates_args=())
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> list[Tensor]:
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


@_conv_backward.register_fake
def _(dy, x, weight, bias, mask, cu_seqlens, left, silu) -> list[Tensor]:
    return [like(x), like(weight), x.new_empty(0) if bias is None else like(bias)]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.left, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, dy):
    x, weight, bias, mask, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias = _conv_backward(dy, x, weight, bias, mask, cu_seqlens, ctx.left, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None, None, None


_conv.register_autograd(_autograd_backward, setup_context=_setup_context)


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
