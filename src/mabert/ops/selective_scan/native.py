"""The selective scan on a CPU through the compiled kernel; see native.cpp."""

import torch
from torch import Tensor

from mabert.ops.native import DTYPES, boundaries, flat, kernels, like, rows, threads
from mabert.ops.selective_scan.kept import KEPT_EVERY

if kernels is not None and kernels.TILE != KEPT_EVERY:
    raise ImportError(
        f"the compiled kernels keep a state every {kernels.TILE} steps, this source every {KEPT_EVERY}: install again"
    )


def forward(
    x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fallback.forward`."""
    common, lengths, _keep_alive = _common(
        x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, delta_softplus, reverse
    )
    y = like(x)
    final = x.new_empty(len(lengths), *A.shape, dtype=torch.float32)
    kept = x.new_empty(kept_rows, *A.shape, dtype=torch.float32)
    kept[sum(-(-length // KEPT_EVERY) for length in lengths) :] = 0
    kernels.scan_forward(
        *common,
        flat("kept", kept) if kept_rows else 0,
        kept_rows,
        flat("initial_state", initial_state),
        rows("y", y, x.dtype),
        flat("final_state", final),
        threads(),
    )
    return y, final, kept


def backward(
    dy, dfinal, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept
) -> list[Tensor]:
    """See `fallback.backward`."""
    common, _, _keep_alive = _common(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, delta_softplus, reverse)
    dy = dy.contiguous()
    dfinal = x.new_zeros(common[1], *A.shape, dtype=torch.float32) if dfinal is None else dfinal.contiguous()
    dx, ddelta = like(x), like(delta)
    dz = like(x) if z is not None else x.new_empty(0)
    dinitial = x.new_empty(0, dtype=torch.float32) if initial_state is None else torch.empty_like(initial_state)
    dA = torch.zeros_like(A)
    dB, dC = (torch.zeros(t.shape, dtype=torch.float32) for t in (B, C))
    dD, dbias = (torch.zeros(A.shape[0]) for _ in range(2))
    kernels.scan_backward(
        *common,
        flat("kept", kept),
        rows("dy", dy, x.dtype),
        flat("dfinal", dfinal),
        rows("dx", dx, x.dtype),
        rows("ddelta", ddelta, x.dtype),
        rows("dz", dz, x.dtype) if z is not None else (0, 0, 0),
        flat("dinitial", dinitial) if initial_state is not None else 0,
        flat("dA", dA),
        flat("dB", dB),
        flat("dC", dC),
        flat("dD", dD),
        flat("dbias", dbias),
        threads(),
    )
    nothing = [x.new_empty(0) for _ in range(2)]
    return [
        dx,
        ddelta,
        dA,
        dB.to(B.dtype),
        dC.to(C.dtype),
        dD if D is not None else nothing[0],
        dz,
        dbias if delta_bias is not None else nothing[1],
        dinitial,
    ]


def _common(x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, delta_softplus, reverse):
    """The arguments that forward and backward share, each sequence's length, and what must outlive the call."""
    if x.dtype not in DTYPES:
        raise ValueError(f"native kernel: x must be float32 or bfloat16, not {x.dtype}. Use backend='torch'.")
    batch, length, inner = x.shape
    lengths = [length] * batch
    if cu_seqlens is not None:
        cu_seqlens, lengths = boundaries(cu_seqlens, length)
    mask = None if mask is None else mask.contiguous()
    arguments = (
        (batch, length, inner, A.shape[1]),
        len(lengths),
        flat("cu_seqlens", cu_seqlens, torch.int32),
        flat("mask", mask, torch.bool),
        x.dtype == torch.bfloat16,
        delta_softplus,
        reverse,
        *(rows(name, t, x.dtype) for name, t in (("x", x), ("delta", delta), ("B", B), ("C", C), ("z", z))),
        flat("A", A),
        flat("D", D),
        flat("delta_bias", delta_bias),
    )
    return arguments, lengths, (cu_seqlens, mask)
