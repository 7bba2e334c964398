"""The scan of Mamba-2, state-space duality: a recurrence whose decay is one number a head, in matrix products.

h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ, y_t = h_t C_t. Within a chunk of steps the outputs are a masked product of C, B
and x, as in attention; from chunk to chunk a state is handed on. torch's matrix products do the work on every device.

Shape suffixes: B batch, L length, S sequences, K heads, P head width, N state, G groups of heads that share B and C, M
heads in a group, R rows (chunks of all sequences), Q and J steps in a chunk.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mabert.ops.boundaries import check_boundaries
from mabert.ops.chunks import ChunkSchedule

CHUNKS = 16, 64
"""The least and the most steps in a chunk: products of its size within, one hand-over of a state per chunk."""
SMALLEST = -104.0
"""The logarithm of a decay that is zero in fp32."""


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ and read out y_t = h_t C_t.

    Args:
        x: (B, L, K, P), floating point.
        delta: (B, L, K), the step sizes Δ, not negative.
        A: (K,), negative.
        B, C: (B, L, G, N); G divides K, and heads in a row share a group.
        cu_seqlens: (S+1,) int32 with B = 1; the state starts anew at each boundary, empty sequences allowed.
        initial_state: (B or S, K, P, N), the state before each sequence's first step; zero when None.
        return_final_state: also return the state after each sequence's last step.

    Returns:
        y (B, L, K, P) in x's dtype, and the final states (B or S, K, P, N) when asked for. Decays and states are held
        in fp32, or in float64 when x is; products run in x's dtype. Gradients flow through both.

    Raises:
        ValueError: shapes do not fit together, or cu_seqlens does not part the row.
    """
    _check_shapes(x, delta, A, B, C, cu_seqlens, initial_state)
    with torch.autocast(x.device.type, enabled=False):
        y, final = _chunked(x, delta, A, B, C, cu_seqlens, initial_state)
    return (y, final) if return_final_state else y


def ssd_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as a loop over time, always with the final states: the specification."""
    _check_shapes(x, delta, A, B, C, cu_seqlens, initial_state)
    if cu_seqlens is not None:
        parts = [
            ssd_reference(
                x[:, start:end],
                delta[:, start:end],
                A,
                B[:, start:end],
                C[:, start:end],
                initial_state=None if initial_state is None else initial_state[s : s + 1],
            )
            for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        outputs, states = zip(*parts, strict=True)
        return torch.cat(outputs, dim=1), torch.cat(states)
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = x.shape[2] // B.shape[2]
    B_BLKN, C_BLKN = (t.to(dtype).repeat_interleave(heads, dim=2) for t in (B, C))
    x_BLKP, delta_BLK, A_K = (t.to(dtype) for t in (x, delta, A))
    shape = (x.shape[0], *x.shape[2:], B.shape[3])
    h_BKPN = x_BLKP.new_zeros(shape) if initial_state is None else initial_state.to(dtype)
    readouts = []
    for t in range(x.shape[1]):
        # PAPER TransMamba Eq. 4: h_t = a_t h_{t-1} + Δ_t x_t B_tᵀ with a_t = exp(Δ_t A), y_t = h_t C_t
        decay_BK11 = torch.exp(delta_BLK[:, t] * A_K)[..., None, None]
        update_BKPN = (delta_BLK[:, t, :, None] * x_BLKP[:, t])[..., None] * B_BLKN[:, t, :, None]
        h_BKPN = decay_BK11 * h_BKPN + update_BKPN
        readouts.append((h_BKPN * C_BLKN[:, t, :, None]).sum(-1))
    y_BLKP = torch.stack(readouts, dim=1) if readouts else x_BLKP
    return y_BLKP.to(x.dtype), h_BKPN


def _chunked(x, delta, A, B, C, cu_seqlens, initial_state) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads, groups = x.shape[2], B.shape[2]
    longest = x.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    size = min(chunk_steps(x.shape[3] * B.shape[3]), 1 << max(longest - 1, 0).bit_length())
    schedule = ChunkSchedule.build(size, x.shape[0], x.shape[1], x.device, cu_seqlens=cu_seqlens)

    def by_group(t: Tensor) -> Tensor:
        """(B, L, K, ...) -> (R, G, M, Q, ...)."""
        return schedule.gather(t).unflatten(2, (groups, -1)).movedim(1, 3)

    delta_RGMQ = by_group(delta.to(dtype))
    inputs_RGMQP = by_group(x) * delta_RGMQ.unsqueeze(-1).to(x.dtype)
    B_RG1QN, C_RG1QN = by_group(B), by_group(C)
    # logarithms of the decay from before the chunk's first step up to and with each step
    coarse_RGMQ, fine_RGMQ = _exact_sums(delta_RGMQ * A.to(dtype).view(groups, -1, 1))
    decayed_RGMQ = coarse_RGMQ + fine_RGMQ
    to_end_RGMQ = (coarse_RGMQ[..., -1:] - coarse_RGMQ) + (fine_RGMQ[..., -1:] - fine_RGMQ)

    # PAPER TransMamba Eq. 5, within a chunk: y = (A× ∘ C Bᵀ)(Δ ∘ x)
    future_QJ = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    coarse_RGMQJ, fine_RGMQJ = (t.unsqueeze(-1) - t.unsqueeze(-2) for t in (coarse_RGMQ, fine_RGMQ))
    between_RGMQJ = (coarse_RGMQJ + fine_RGMQJ).masked_fill(future_QJ, -torch.inf).exp()
    y_RGMQP = ((C_RG1QN @ B_RG1QN.mT) * between_RGMQJ.to(x.dtype)) @ inputs_RGMQP

    # what the chunk adds to the state by its end, and the state before each chunk
    added_RGMPN = ((inputs_RGMQP * to_end_RGMQ.exp().to(x.dtype).unsqueeze(-1)).mT @ B_RG1QN).to(dtype)
    state_shape = (len(schedule.rank_S), heads, x.shape[3], B.shape[3])
    if initial_state is None:
        initial_SKPN = x.new_zeros(state_shape, dtype=dtype)
    else:
        initial_SKPN = initial_state.to(dtype)[schedule.rank_S]
    before_RKPN, final_SKPN = _HandOver.apply(
        decayed_RGMQ[..., -1].exp().flatten(1),
        added_RGMPN.flatten(1, 2),
        initial_SKPN,
        schedule.running,
        schedule.offsets,
    )
    before_RGMPN = before_RKPN.unflatten(1, (groups, -1)).to(x.dtype)
    y_RGMQP = y_RGMQP + decayed_RGMQ.exp().unsqueeze(-1).to(x.dtype) * (C_RG1QN @ before_RGMPN.mT)
    y = schedule.scatter(y_RGMQP.movedim(3, 1).flatten(2, 3), x)
    return y, torch.empty_like(final_SKPN).index_copy(0, schedule.rank_S, final_SKPN)


def chunk_steps(numbers: int) -> int:
    """Steps in a chunk where a head's state has so many numbers: those that make the products within as large as it is.

    Work within grows with the chunk, that on states falls with it.
    """
    least, most = CHUNKS
    return min(max(1 << round(math.log2(numbers) / 2), least), most)


def _exact_sums(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of logarithms of decays over the last dimension, in two parts whose differences lose no digits.

    The coarse parts are multiples of 1/1024, exact as long as the sums stay below 8192, which 64 steps of at least
    exp(-104), the smallest number in fp32, do. The fine parts are small, and carry the gradient.
    """
    decay = decay.clamp(min=SMALLEST)
    coarse = (decay.detach() * 1024).round() / 1024
    return coarse.cumsum(-1), (decay - coarse).cumsum(-1)


class _HandOver(torch.autograd.Function):
    """The recurrence over chunks: h ← decay · h + added, for all sequences that are still running."""

    @staticmethod
    def forward(
        ctx: Any, decay_RK: Tensor, added_RKPN: Tensor, initial_SKPN: Tensor, running: list[int], offsets: list[int]
    ) -> tuple[Tensor, Tensor]:
        """The states before each chunk, and the last ones."""
        before_RKPN, h_SKPN = torch.empty_like(added_RKPN), initial_SKPN.clone()
        for n, offset in zip(running, offsets, strict=True):
            rows, h = slice(offset, offset + n), h_SKPN[:n]
            before_RKPN[rows] = h
            h.mul_(decay_RK[rows, :, None, None]).add_(added_RKPN[rows])
        ctx.save_for_backward(decay_RK, before_RKPN)
        ctx.running, ctx.offsets = running, offsets
        return before_RKPN, h_SKPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore_RKPN: Tensor, dfinal_SKPN: Tensor) -> tuple[Tensor | None, ...]:
        """The recurrence run from the end to the beginning."""
        decay_RK, before_RKPN = ctx.saved_tensors
        dh_SKPN = dfinal_SKPN.clone()
        ddecay_RK, dadded_RKPN = torch.empty_like(decay_RK), torch.empty_like(before_RKPN)
        for n, offset in zip(reversed(ctx.running), reversed(ctx.offsets), strict=True):
            rows, dh = slice(offset, offset + n), dh_SKPN[:n]
            dadded_RKPN[rows] = dh
            ddecay_RK[rows] = (dh * before_RKPN[rows]).sum((-1, -2))
            dh.mul_(decay_RK[rows, :, None, None]).add_(dbefore_RKPN[rows])
        return ddecay_RK, dadded_RKPN, dh_SKPN, None, None


def _check_shapes(x, delta, A, B, C, cu_seqlens, initial_state) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"ssd takes x (B, L, K, P) and B (B, L, G, N), not {tuple(x.shape)} and {tuple(B.shape)}.")
    batch, length, heads, width = x.shape
    groups, state_size = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"ssd: {heads} heads cannot be divided among {groups} groups of B and C.")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens describes one row of packed sequences, but x has {batch} rows.")
        check_boundaries(cu_seqlens, length)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = {
        "delta": (delta, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, state_size)),
        "C": (C, (batch, length, groups, state_size)),
        "initial_state": (initial_state, (sequences, heads, width, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"ssd: {name} must have shape {shape}, not {tuple(tensor.shape)}.")
