"""The short depthwise convolution before the scan (Eq. 5): `depthwise_conv`."""

from types import ModuleType

import torch
from torch import Tensor

from mabert.ops.backend import choose_backend, report_backend
from mabert.ops.boundaries import check_boundaries, check_mask
from mabert.ops.depthwise_conv import fallback, native, reference
from mabert.ops.native import like


def implementation(backend: str) -> ModuleType:
    """The module with a backend's `forward` and `backward`."""
    if backend == "triton":
        from mabert.ops.depthwise_conv import triton  # not before it is needed: most machines have no GPU

        return triton
    return native


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "centered",
    activation: str | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel over time with a kernel of its own.

    Args:
        x: (B, L, E) floating point, channels last.
        weight: (E, W).
        bias: (E,).
        mode: "centered" sees (W-1)//2 neighbours to the left and W//2 to the right, "causal" W-1 to the left.
        activation: applied to the output.
        mask: (B, L) bool; False counts as zero for its neighbours and has zero output.
        cu_seqlens: (S+1,) int32 with B = 1; neighbours beyond a boundary count as zero.
        reverse: run against time, so that left and right change places and the kernel is flipped.
        backend: see `mabert.ops.use_backend`.

    Returns:
        (B, L, E) in x's dtype; sums in at least fp32.

    Raises:
        ValueError: a shape does not fit, cu_seqlens does not part the row, or mode or activation is unknown.
    """
    if mode not in ("centered", "causal") or activation not in ("silu", None):
        raise ValueError(
            f"depthwise_conv knows modes 'centered' and 'causal' and activation 'silu' or None, "
            f"not mode={mode!r}, activation={activation!r}."
        )
    _check_shapes(x, weight, bias, mask, cu_seqlens)
    width = weight.shape[1]
    # CHOICE: a centred kernel of even width sees one more neighbour to the right than to the left
    left = (width - 1) // 2 if mode == "centered" else width - 1
    if reverse:
        weight, left = weight.flip(1), width - 1 - left
    arguments = (x, weight, bias, mask, cu_seqlens, left, activation == "silu")
    name = choose_backend("depthwise_conv", x.device, x.dtype, backend)
    if name == "reference":
        return reference.depthwise_conv(*arguments)
    if name == "torch":
        return fallback.depthwise_conv(*arguments)
    return _conv(*arguments, name)


@torch.library.custom_op("mabert::depthwise_conv", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
    backend: str,
) -> Tensor:
    report_backend("depthwise_conv", x.device, x.dtype, backend)
    return implementation(backend).forward(x, weight, bias, mask, cu_seqlens, left, silu)


@_conv.register_fake
def _(x, weight, bias, mask, cu_seqlens, left, silu, backend) -> Tensor:
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
    backend: str,
) -> list[Tensor]:
    return implementation(backend).backward(dy, x, weight, bias, mask, cu_seqlens, left, silu)


@_conv_backward.register_fake
def _(dy, x, weight, bias, mask, cu_seqlens, left, silu, backend) -> list[Tensor]:
    return [like(x), like(weight), x.new_empty(0) if bias is None else like(bias)]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.left, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, dy):
    x, weight, bias, mask, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias = _conv_backward(dy, x, weight, bias, mask, cu_seqlens, ctx.left, ctx.silu, ctx.backend)
    return dx, dweight, None if bias is None else dbias, None, None, None, None, None


_conv.register_autograd(_autograd_backward, setup_context=_setup_context)


def _check_shapes(x, weight, bias, mask, cu_seqlens) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"depthwise_conv takes x (B, L, E) and weight (E, W), W at least 1, not {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    check_mask(mask, x.shape[:2])
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"depthwise_conv: bias must have shape {tuple(x.shape[2:])}, not {tuple(bias.shape)}.")
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens describes one row of packed sequences, but x has {x.shape[0]} rows.")
        check_boundaries(cu_seqlens, x.shape[1])
