"""The selective scan in plain PyTorch: chunks of a few steps, the backward written by hand. Runs anywhere, slowly.

Real tokens are first gathered, in scan order, into chunks of CHUNK steps, one row of chunks a sequence, so that padded,
masked, packed and reversed input all become the same problem and no pad is read. Chunks with the same index are
advanced together (the longest sequences first, so that the ones still running are a prefix). Exponentials and readouts
are vectorised over a chunk; only the recurrence itself is a loop. The forward keeps one state every CHUNK·GROUP steps,
the backward recomputes what lies between.

Shape suffixes: T real tokens in all, S sequences, E inner, N state, K chunks advanced together, J steps in a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mabert.ops.chunks import ChunkSchedule
from mabert.ops.selective_scan.kept import KEPT_EVERY

CHUNK = 8
GROUP = KEPT_EVERY // CHUNK


@dataclass(frozen=True)
class _Chunks:
    """The scan's inputs in the order of the schedule, at least fp32, Δ ready to use."""

    schedule: ChunkSchedule
    x: Tensor
    delta: Tensor
    A_EN: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def build(cls, x, delta, A, B, C, delta_bias, mask, cu_seqlens, delta_softplus, reverse) -> "_Chunks":
        dtype = torch.promote_types(x.dtype, torch.float32)
        schedule = ChunkSchedule.build(
            CHUNK, x.shape[0], x.shape[1], x.device, mask_BL=mask, cu_seqlens=cu_seqlens, reverse=reverse
        )
        delta = schedule.gather(delta.to(dtype))
        if delta_bias is not None or delta_softplus:
            delta = delta if delta_bias is None else delta + delta_bias.to(dtype)
            delta = F.softplus(delta) if delta_softplus else delta
            delta = delta.where(schedule.is_real().unsqueeze(-1), delta.new_zeros(()))
        gathered = [schedule.gather(t.to(dtype)) for t in (x, B, C)]
        return cls(schedule, gathered[0], delta, A.to(dtype), gathered[1], gathered[2])

    def rows(self, chunk: int) -> slice:
        offset = self.schedule.offsets[chunk]
        return slice(offset, offset + self.schedule.running[chunk])

    def states(self, chunk: int, h_KEN: Tensor) -> tuple[Tensor, Tensor]:
        """Decays and states of every step of a chunk, (K, J, E, N) each, from the state before it."""
        rows = self.rows(chunk)
        decay = torch.exp(self.delta[rows].unsqueeze(-1) * self.A_EN)
        states = (self.delta[rows] * self.x[rows]).unsqueeze(-1) * self.B[rows].unsqueeze(2)
        for j in range(CHUNK):
            h_KEN = states[:, j].addcmul_(decay[:, j], h_KEN)
        return decay, states

    def starting_states(self, initial_state: Tensor | None) -> Tensor:
        """(S, E, N) in rank order."""
        sequences, shape = self.schedule.rank_S.numel(), self.A_EN.shape
        if initial_state is None:
            return self.x.new_zeros(sequences, *shape)
        return initial_state.to(self.x.dtype)[self.schedule.rank_S]


def forward(
    x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final states, and the states kept for `backward` (`kept_rows` of them or fewer, none if 0)."""
    chunks = _Chunks.build(x, delta, A, B, C, delta_bias, mask, cu_seqlens, delta_softplus, reverse)
    schedule = chunks.schedule
    final_SEN = chunks.starting_states(initial_state)
    kept = chunks.x.new_zeros(kept_rows, *A.shape)
    kept_so_far = 0
    s = torch.empty_like(chunks.x)
    for chunk, running in enumerate(schedule.running):
        h_KEN = final_SEN[:running]
        if kept_rows and chunk % GROUP == 0:
            kept[kept_so_far : kept_so_far + running] = h_KEN
            kept_so_far += running
        rows = chunks.rows(chunk)
        _, states = chunks.states(chunk, h_KEN)
        torch.matmul(states, chunks.C[rows].unsqueeze(-1), out=s[rows].unsqueeze(-1))
        final_SEN[:running] = states[:, -1]
    if D is not None:
        s.addcmul_(chunks.x, D.to(s.dtype))
    y = schedule.scatter(s, x)
    if z is not None:
        y = (y.to(s.dtype) * F.silu(z.to(s.dtype))).to(x.dtype)
        if mask is not None:
            y = y.where(mask.unsqueeze(-1), y.new_zeros(()))
    final = torch.empty_like(final_SEN)
    final[schedule.rank_S] = final_SEN
    return y, final, kept


def backward(
    dy, dfinal, x, delta, A, B, C, D, z, delta_bias, mask, cu_seqlens, initial_state, delta_softplus, reverse, kept
) -> list[Tensor]:
    """Gradients of x, delta, A, B, C, D, z, delta_bias, initial_state; empty tensors for inputs that were None."""
    chunks = _Chunks.build(x, delta, A, B, C, delta_bias, mask, cu_seqlens, delta_softplus, reverse)
    schedule = chunks.schedule
    dtype = chunks.x.dtype
    dy = schedule.gather(dy.to(dtype))
    gate = None
    if z is not None:
        z_gathered = schedule.gather(z.to(dtype))
        sigmoid = torch.sigmoid(z_gathered)
        gate = z_gathered * sigmoid
        dgate, dy = dy, dy * gate
    s = torch.empty_like(chunks.x) if z is not None else None
    dx, ddelta = torch.empty_like(chunks.x), torch.empty_like(chunks.x)
    dB, dC = torch.empty_like(chunks.B), torch.empty_like(chunks.C)
    dA_EN = torch.zeros_like(chunks.A_EN)
    if dfinal is None:
        dfinal = x.new_zeros(len(schedule.rank_S), *A.shape, dtype=dtype)
    dh_SEN = dfinal.to(dtype)[schedule.rank_S]

    group_starts = [
        sum(schedule.running[c] for c in range(0, g, GROUP)) for g in range(0, len(schedule.running), GROUP)
    ]
    for first in reversed(range(0, len(schedule.running), GROUP)):
        group = range(first, min(first + GROUP, len(schedule.running)))
        start = group_starts[first // GROUP]
        befores = [kept[start : start + schedule.running[first]]]
        for chunk in group[:-1]:
            _, states = chunks.states(chunk, befores[-1])
            befores.append(states[: schedule.running[chunk + 1], -1].clone())
        for chunk in reversed(group):
            rows = chunks.rows(chunk)
            running, before = schedule.running[chunk], befores.pop()
            decay, states = chunks.states(chunk, before)
            x_KJE, delta_KJE, B_KJN, C_KJN, dy_KJE = (t[rows] for t in (chunks.x, chunks.delta, chunks.B, chunks.C, dy))
            if s is not None:
                torch.matmul(states, C_KJN.unsqueeze(-1), out=s[rows].unsqueeze(-1))
            dstates = dy_KJE.unsqueeze(-1) * C_KJN.unsqueeze(2)
            dh_KEN = dh_SEN[:running]
            for j in reversed(range(CHUNK)):
                dh_KEN += dstates[:, j]
                dstates[:, j] = dh_KEN
                dh_KEN *= decay[:, j]
            torch.matmul(dy_KJE.unsqueeze(2), states, out=dC[rows].unsqueeze(2))
            torch.matmul((delta_KJE * x_KJE).unsqueeze(2), dstates, out=dB[rows].unsqueeze(2))
            dinput = torch.matmul(dstates, B_KJN.unsqueeze(-1)).squeeze(-1)
            # what is left of states after this is the state before each step
            states[:, 1:] = states[:, :-1].clone()
            states[:, 0] = before
            dexponent = dstates.mul_(decay).mul_(states)
            ddelta[rows] = torch.einsum("kjen,en->kje", dexponent, chunks.A_EN).addcmul_(dinput, x_KJE)
            dA_EN += torch.einsum("kjen,kje->en", dexponent, delta_KJE)
            dx[rows] = dinput * delta_KJE

    dD, dz, ddelta_bias, dinitial = (x.new_empty(0) for _ in range(4))  # an op's outputs may not alias each other
    if D is not None:
        dD = torch.einsum("kje,kje->e", dy, chunks.x).to(D.dtype)
        dx.addcmul_(dy, D.to(dtype))
    if z is not None:
        assert s is not None
        assert gate is not None
        if D is not None:
            s.addcmul_(chunks.x, D.to(dtype))
        dz = schedule.scatter(dgate * s * (sigmoid + gate * (1 - sigmoid)), z)
    if delta_softplus:
        ddelta *= 1 - torch.exp(-chunks.delta)  # softplus' = sigmoid, written through softplus itself
    if delta_bias is not None:
        ddelta_bias = ddelta[schedule.is_real()].sum(0).to(delta_bias.dtype)
    if initial_state is not None:
        dinitial = torch.empty_like(dh_SEN)
        dinitial[schedule.rank_S] = dh_SEN
        dinitial = dinitial.to(initial_state.dtype)
    return [
        schedule.scatter(dx, x),
        schedule.scatter(ddelta, delta),
        dA_EN.to(A.dtype),
        schedule.scatter(dB, B),
        schedule.scatter(dC, C),
        dD,
        dz,
        ddelta_bias,
        dinitial,
    ]
