"""The depthwise convolution on a GPU in Triton; see docs/kernels.md.

A program computes tiles of a few tokens by a block of channels; the neighbours that tiles share come from the cache.
The backward computes the sums before the activation again where it needs them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mabert.ops.gpu import INTERPRETED, check_input, on_device_of_first, rows, sequence_of
from mabert.ops.native import like
from mabert.ops.triton_math import channels, sigmoid

# Tokens and channels of a tile, warps, and tiles of a program in the backward, whose sums over time are partial.
TILE, BLOCK, WARPS, TILES = (4, 8, 1, 2) if INTERPRETED else (16, 64, 2, 32)


@on_device_of_first
def forward(x, weight, bias, mask, cu_seqlens, left, silu) -> Tensor:
    """See `reference.depthwise_conv`."""
    y = like(x)
    if x.numel():
        arguments, options = _common(x, weight, bias, mask, cu_seqlens, left, silu)
        grid = (triton.cdiv(x.shape[1], TILE), triton.cdiv(x.shape[2], BLOCK), x.shape[0])
        _forward[grid](*arguments, y, **options)
    return y


@on_device_of_first
def backward(dy, x, weight, bias, mask, cu_seqlens, left, silu) -> list[Tensor]:
    """Gradients of x, weight and bias; an empty tensor for a bias that is absent."""
    batch, length, inner = x.shape
    dx = like(x)
    parts = triton.cdiv(length, TILE * TILES)
    dweight_part = torch.zeros(batch, parts, weight.shape[1], inner, device=x.device)
    dbias_part = torch.zeros(batch, parts, inner, device=x.device)
    if x.numel():
        arguments, options = _common(x, weight, bias, mask, cu_seqlens, left, silu)
        grid = (parts, triton.cdiv(inner, BLOCK), batch)
        _backward[grid](*arguments, dy.contiguous(), dx, dweight_part, dbias_part, TILES=TILES, **options)
    dweight = dweight_part.sum((0, 1)).T.to(weight.dtype, memory_format=torch.contiguous_format)
    return [dx, dweight, x.new_empty(0) if bias is None else dbias_part.sum((0, 1)).to(bias.dtype)]


def _common(x, weight, bias, mask, cu_seqlens, left, silu):
    """The arguments that forward and backward share."""
    check_input(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"triton kernel: {name} must be float32 or {x.dtype}, not {tensor.dtype}.")
    arguments = (
        *rows("x", x, x),
        weight.T.contiguous(),
        None if bias is None else bias.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        None if cu_seqlens is None else sequence_of(cu_seqlens, x.shape[1]),
        x.shape[1],
        x.shape[2],
    )
    options = {"W": weight.shape[1], "LEFT": left, "SILU": silu, "T": TILE, "BLOCK": BLOCK, "num_warps": WARPS}
    return arguments, options


@triton.jit
def _exists(token, own, length, row, mask, sequence_of):
    """Whether a token can be seen from its neighbours of sequence `own`: it exists, is real and of that sequence."""
    exists = (token >= 0) & (token < length)
    if sequence_of is not None:
        exists = exists & (tl.load(sequence_of + token, mask=exists, other=-1) == own)
    if mask is not None:
        exists = exists & (tl.load(mask + row * length + token, mask=exists, other=0) != 0)
    return exists


@triton.jit
def _values(x, x_row, x_time, row, token, e, mask):
    return tl.load(x + row * x_row + token.to(tl.int64) * x_time + e, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before_activation(
    x, x_row, x_time, weight, bias, mask, sequence_of, length, inner, row, token, own, e, some,
    W: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """The sums at the given tokens (T, E) of sequence `own`."""
    out = tl.zeros_like(token + e).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + e, mask=some, other=0.0).to(tl.float32)
    for w in tl.static_range(W):
        neighbour = token + (w - LEFT)
        seen = _exists(neighbour, own, length, row, mask, sequence_of)
        tap = tl.load(weight + w * inner + e, mask=some, other=0.0).to(tl.float32)
        out += tap * _values(x, x_row, x_time, row, neighbour, e, seen & some)
    return out


@triton.jit
def _own_sequence(token, length, sequence_of):
    own = tl.zeros_like(token)
    if sequence_of is not None:
        own = tl.load(sequence_of + token, mask=token < length, other=-1)
    return own


@triton.jit(do_not_specialize=["length"])
def _forward(
    x, x_row, x_time, weight, bias, mask, sequence_of, length, inner, y,
    W: tl.constexpr, LEFT: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = channels(tl.program_id(1), BLOCK)
    token = tl.program_id(0) * T + tl.arange(0, T)[:, None]
    row = tl.program_id(2).to(tl.int64)
    some = e < inner
    own = _own_sequence(token, length, sequence_of)
    out = _before_activation(
        x, x_row, x_time, weight, bias, mask, sequence_of, length, inner, row, token, own, e, some, W, LEFT
    )
    if SILU:
        out *= sigmoid(out)
    out = tl.where(_exists(token, own, length, row, mask, sequence_of), out, 0.0)
    at = y + (row * length + token) * inner + e
    tl.store(at, out.to(y.dtype.element_ty), mask=(token < length) & some)


@triton.jit(do_not_specialize=["length"])
def _backward(
    x, x_row, x_time, weight, bias, mask, sequence_of, length, inner, dy, dx, dweight, dbias,
    W: tl.constexpr, LEFT: tl.constexpr, SILU: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    e = channels(tl.program_id(1), BLOCK)
    row = tl.program_id(2).to(tl.int64)
    some = e < inner
    part = row * tl.num_programs(0) + tl.program_id(0)
    bias_gradient = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * T + tl.arange(0, T)[:, None]
        own = _own_sequence(token, length, sequence_of)
        real = _exists(token, own, length, row, mask, sequence_of)
        gradient = tl.zeros([T, BLOCK], tl.float32)
        for w in tl.static_range(W):
            reader = token + (LEFT - w)  # the token whose sum reads this one through tap w
            seen = _exists(reader, own, length, row, mask, sequence_of) & real
            given = _values(dy + row * length * inner, 0, inner, row, reader, e, seen & some)
            if SILU:
                ungated = _before_activation(
                    x, x_row, x_time, weight, bias, mask, sequence_of, length, inner, row, reader, own, e, some, W, LEFT
                )
                s = sigmoid(ungated)
                given *= s + ungated * s * (1.0 - s)
            gradient += given * tl.load(weight + w * inner + e, mask=some, other=0.0).to(tl.float32)
            if w == LEFT:
                bias_gradient += tl.sum(given, axis=0, keep_dims=True)
            values = _values(x, x_row, x_time, row, token, e, real & some)
            at = dweight + (part * W + w) * inner + e
            total = tl.load(at, mask=some, other=0.0) + tl.sum(given * values, axis=0, keep_dims=True)
            tl.store(at, total, mask=some)
        at = dx + (row * length + token) * inner + e
        tl.store(at, gradient.to(dx.dtype.element_ty), mask=(token < length) & some)
    tl.store(dbias + part * inner + e, bias_gradient, mask=some)
