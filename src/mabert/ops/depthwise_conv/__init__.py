"""The short depthwise convolution before the scan (Eq. 5): `depthwise_conv`."""

from torch import Tensor

from mabert.ops.backend import choose_backend
from mabert.ops.boundaries import check_boundaries
from mabert.ops.depthwise_conv import fallback, native, reference

IMPLEMENTATIONS = {
    "native": native.depthwise_conv,
    "torch": fallback.depthwise_conv,
    "reference": reference.depthwise_conv,
}


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
    run = IMPLEMENTATIONS[choose_backend("depthwise_conv", x.device, x.dtype, backend)]
    return run(x, weight, bias, mask, cu_seqlens, left, activation == "silu")


def _check_shapes(x, weight, bias, mask, cu_seqlens) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"depthwise_conv takes x (B, L, E) and weight (E, W), W at least 1, not {tuple(x.shape)} and "
            f"{tuple(weight.shape)}."
        )
    for name, tensor, shape in (("bias", bias, x.shape[2:]), ("mask", mask, x.shape[:2])):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"depthwise_conv: {name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}.")
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens describes one row of packed sequences, but x has {x.shape[0]} rows.")
        check_boundaries(cu_seqlens, x.shape[1])
