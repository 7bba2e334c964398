"""The selective scan of Mamba-1 (Eqs. 7-9): `selective_scan`."""

from types import ModuleType

import torch
from torch import Tensor

from mabert.ops.backend import choose_backend, report_backend
from mabert.ops.boundaries import check_boundaries, check_mask
from mabert.ops.native import like
from mabert.ops.selective_scan import fallback, native, reference
from mabert.ops.selective_scan.kept import kept_rows


def implementation(backend: str) -> ModuleType:
    """The module with a backend's `forward` and `backward`."""
    if backend == "triton":
        from mabert.ops.selective_scan import triton  # not before it is needed: most machines have no GPU

        return triton
    return {"torch": fallback, "native": native}[backend]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run h_t = exp(Δ_t A) h_{t-1} + (Δ_t x_t) B_t and read out y_t = (h_t C_t + D x_t) · silu(z_t).

    Args:
        x, delta, z: (B, L, E), floating point, channels last.
        A: (E, N), negative in a Mamba layer.
        B, C: (B, L, N).
        D, delta_bias: (E,).
        delta_softplus: Δ = softplus(delta + delta_bias) rather than delta + delta_bias.
        mask: (B, L) bool; False is an identity step with zero output, whatever stands there.
        cu_seqlens: (S+1,) int32 with B = 1; the state starts anew at each boundary, empty sequences allowed.
        reverse: scan each sequence from its end to its beginning.
        initial_state: (B or S, E, N), the state before each sequence's first step; zero when None.
        return_final_state: also return the state after each sequence's last step.
        backend: see `mabert.ops.use_backend`.

    Returns:
        y (B, L, E) in x's dtype, and the final states (B or S, E, N) when asked for. State, A and Δ are held in fp32,
        or in float64 when x is. Gradients flow through both.

    Raises:
        ValueError: shapes do not fit together, or cu_seqlens does not part the row.
    """
    _check_shapes(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state)
    name = choose_backend("selective_scan", x.device, x.dtype, backend)
    if name == "reference":
        y, final_state = reference.selective_scan(
            x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse
        )
    else:
        inputs = (x, delta, A, B, C, D, z, delta_bias, initial_state)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        rows = kept_rows(name, x.shape[0], x.shape[1], sequences) if keep else 0
        y, final_state, _ = _scan(
            x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, rows, name
        )
    return (y, final_state) if return_final_state else y


@torch.library.custom_op("mabert::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    kept_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    report_backend("selective_scan", x.device, x.dtype, backend)
    with torch.autocast(x.device.type, enabled=False):
        return implementation(backend).forward(
            x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows
        )


@_scan.register_fake
def _(
    x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows, backend
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    inner, state = A.shape
    if backend == "triton":
        final = x.new_empty(sequences, state, inner, dtype=dtype).mT
    else:
        final = x.new_empty(sequences, inner, state, dtype=dtype)
    return like(x), final, x.new_empty(kept_rows, inner, state, dtype=dtype)


@torch.library.custom_op("mabert::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    kept: Tensor,
    backend: str,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return implementation(backend).backward(
            dy, dfinal, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse,
            kept,
        )  # fmt: skip


@_scan_backward.register_fake
def _(
    dy,
    dfinal,
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    mask,
    cu_seqlens,
    initial_state,
    delta_softplus,
    reverse,
    kept,
    backend,
) -> list[Tensor]:
    return [x.new_empty(0) if t is None else like(t) for t in (x, delta, A, B, C, D, z, delta_bias, initial_state)]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.y_shape = output[0].shape
    ctx.set_materialize_grads(False)  # or it would make zeros for the kept states as well


def _autograd_backward(ctx, dy, dfinal, _dkept):
    *tensors, kept = ctx.saved_tensors
    x = tensors[0]
    dy = x.new_zeros(ctx.y_shape) if dy is None else dy
    grads = _scan_backward(dy, dfinal, *tensors, ctx.delta_softplus, ctx.reverse, kept, ctx.backend)
    x, delta, A, B, C, D, z, delta_bias, initial_state = (
        g if t is not None else None for g, t in zip(grads, (*tensors[:8], tensors[10]), strict=True)
    )
    return x, delta, A, B, C, D, z, delta_bias, None, None, initial_state, None, None, None, None


_scan.register_autograd(_autograd_backward, setup_context=_setup_context)


def _check_shapes(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state) -> None:
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(f"selective_scan takes x (B, L, E) and A (E, N), not {tuple(x.shape)} and {tuple(A.shape)}.")
    batch, length, inner = x.shape
    state_size = A.shape[1]
    check_mask(mask, x.shape[:2])
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens describes one row of packed sequences, but x has {batch} rows.")
        check_boundaries(cu_seqlens, length)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = {
        "delta": (delta, (batch, length, inner)),
        "A": (A, (inner, state_size)),
        "B": (B, (batch, length, state_size)),
        "C": (C, (batch, length, state_size)),
        "D": (D, (inner,)),
        "z": (z, (batch, length, inner)),
        "delta_bias": (delta_bias, (inner,)),
        "initial_state": (initial_state, (sequences, inner, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} must have shape {shape}, not {tuple(tensor.shape)}.")
