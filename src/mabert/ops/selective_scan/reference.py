"""The selective scan as a loop over time: the specification that every backend is tested against.

Shape suffixes: B batch, L length, T tokens in all, S sequences, E inner, N state.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan(
    x_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None,
    z_BLE: Tensor | None,
    delta_bias_E: Tensor | None,
    mask_BL: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, E) in x's dtype and final states (B or S, E, N) in at least fp32; differentiable by autograd."""
    if cu_seqlens is not None:
        outputs, states = [], []
        bounds = cu_seqlens.tolist()
        for s, (start, end) in enumerate(pairwise(bounds)):
            y, state = selective_scan(
                x_BLE[:, start:end],
                delta_BLE[:, start:end],
                A_EN,
                B_BLN[:, start:end],
                C_BLN[:, start:end],
                D_E,
                None if z_BLE is None else z_BLE[:, start:end],
                delta_bias_E,
                None if mask_BL is None else mask_BL[:, start:end],
                None,
                None if initial_state is None else initial_state[s : s + 1],
                delta_softplus,
                reverse,
            )
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    dtype = torch.promote_types(x_BLE.dtype, torch.float32)
    x, delta, A, B, C = (t.to(dtype) for t in (x_BLE, delta_BLE, A_EN, B_BLN, C_BLN))
    z = None if z_BLE is None else z_BLE.to(dtype)
    real = None if mask_BL is None else mask_BL.unsqueeze(-1)
    if real is not None:
        x, delta, B, C = (t.where(real, t.new_zeros(())) for t in (x, delta, B, C))
        z = None if z is None else z.where(real, z.new_zeros(()))
    if delta_bias_E is not None:
        delta = delta + delta_bias_E.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)  # PAPER Eq. 7: the step size is positive
    if real is not None:
        delta = delta.where(real, delta.new_zeros(()))  # exp(0·A) = 1 and 0·x = 0: the identity step

    batch, length, inner = x.shape
    state_size = A.shape[1]
    h_BEN = x.new_zeros(batch, inner, state_size) if initial_state is None else initial_state.to(dtype)
    steps = range(length - 1, -1, -1) if reverse else range(length)
    readouts: dict[int, Tensor] = {}
    for t in steps:
        # PAPER Eq. 8: h_t = exp(Δ_t A) h_{t-1} + (Δ_t x_t) B_t, s_t = h_t C_t + D x_t
        decay_BEN = torch.exp(delta[:, t, :, None] * A)
        h_BEN = decay_BEN * h_BEN + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t, None, :]
        readouts[t] = (h_BEN * C[:, t, None, :]).sum(-1)
    s_BLE = torch.stack([readouts[t] for t in range(length)], dim=1) if length else x
    if D_E is not None:
        s_BLE = s_BLE + D_E.to(dtype) * x
    if z is not None:
        s_BLE = s_BLE * F.silu(z)  # PAPER Eq. 9: the gate
    if real is not None:
        s_BLE = s_BLE.where(real, s_BLE.new_zeros(()))
    return s_BLE.to(x_BLE.dtype), h_BEN
