"""The TransMamba mixer: attention up to the TransPoint and SSM from there, by the same weights (arXiv 2503.24067).

Shape suffixes: T new tokens, S sequences, M tokens remembered at most, H hidden, K heads, P head width, N state (as
wide as a head: keys are what B is, values what x is).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mabert.causal_config import TransMambaConfig
from mabert.layers.attention import Attention, rotary_angles, rotate
from mabert.layers.causal_conv import CausalConv
from mabert.layers.memory import LayerMemory
from mabert.ops import SequenceLayout, ssd
from mabert.ops.packing import Split

ATTENDED = ("keys", "values", "steps", "positions")
"""What is remembered of each token before the TransPoint, and forgotten behind it."""


class TransMambaMixer(nn.Module):
    """One set of C, B and x, used as queries, keys and values before the TransPoint and in a scan behind it."""

    def __init__(self, config: TransMambaConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.head_size = config, layer, config.head_size
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.cbx_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.conv = CausalConv(3 * hidden, config.conv_kernel)
        self.dt_proj = nn.Linear(hidden, heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.z_proj = nn.Linear(hidden, hidden, bias=False)
        self.attention = Attention(config, is_causal=True)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, h_TH: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, H) to (T, H). Remembers keys, values and steps up to the TransPoint, then a `state` (S, K, P, N)."""
        if layout.recurrence is not layout or layout.reach is not layout:
            raise ValueError("TransMamba hands attention's memory to the scan: only hybrids by layer can be probed.")
        point = self.config.layer_transpoints()[self.layer]
        # PAPER TransMamba Eqs. 1 and 3: C, B, x = δ(h W), for both parts; the convolution runs over all tokens
        cbx_T3KP = self.conv(self.cbx_proj(h_TH), layout, memory).unflatten(-1, (3, -1, self.head_size))
        # PAPER TransMamba Eq. 3: Δ = σ(h W_Δ + b_Δ), A = exp(-Δ e^{log A}); also before the TransPoint, to convert
        dtype = torch.promote_types(h_TH.dtype, torch.float32)
        steps_TK = F.softplus(self.dt_proj(h_TH).to(dtype) + self.dt_bias.to(dtype))
        A_K = -torch.exp(self.A_log.to(dtype))

        split = layout.split(point)
        (before, after), (steps_before, steps_after) = split.take(cbx_T3KP), split.take(steps_TK)
        positions, _ = split.take(layout.positions)
        if memory is not None:
            new = {"keys": before[:, 1], "values": before[:, 2], "steps": steps_before, "positions": positions}
            memory.write(split.before, **new)
        y_before = self._attend(before, positions, split.before, memory)
        y_after = after[:, 2]
        if len(after):
            state = self._initial_state(point, before, steps_before, A_K, split, memory)
            C, B, x = after[None].unbind(2)
            # PAPER TransMamba Eqs. 4 and 5
            y, final = ssd(
                x,
                steps_after[None],
                A_K,
                B,
                C,
                cu_seqlens=split.after.cu_seqlens,
                initial_state=state,
                return_final_state=True,
            )
            # CHOICE: the gate z acts behind the TransPoint only; the paper finds it harmful on attention (Table 10)
            z = self.z_proj(split.take(h_TH)[1]).unflatten(-1, (-1, self.head_size))
            y_after = y[0] * F.silu(z)
            if memory is not None:
                memory.keep("state", final)
        if memory is not None and bool((split.after.ends_S > point).all()):
            memory.drop(*ATTENDED)  # every sequence has passed it
        # PAPER TransMamba Eq. 6: y = [y_s, y_l]
        return self.out_proj(split.join(y_before, y_after).flatten(-2))

    def _attend(self, qkv: Tensor, positions: Tensor, layout: SequenceLayout, memory: LayerMemory | None) -> Tensor:
        """Causal attention before the TransPoint; rotary positions are here only."""
        if not len(qkv):
            return qkv[:, 2]
        query, key, value = qkv.unbind(1)
        query = self._rotated(query, positions)
        if memory is None or layout.past_S is None:
            return self.attention(torch.stack((query, self._rotated(key, positions), value), dim=1), layout)
        # PAPER TransMamba Eq. 2: y_s = softmax(Q Kᵀ) V
        keys, values, places = (memory.tensors[name] for name in ("keys", "values", "positions"))
        return self.attention.with_past(query, self._rotated(keys, places), values, layout)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, *rotary_angles(positions, self.head_size, self.config.rope_parameters["rope_theta"], x.dtype))

    def _initial_state(
        self, point: int, before: Tensor, steps: Tensor, A_K: Tensor, split: Split, memory: LayerMemory | None
    ) -> Tensor | None:
        """The state (S, K, P, N) before each sequence's first token of the SSM among the new ones."""
        remembered = None if memory is None else memory.get("state")
        crosses_S = split.after.lengths_S > 0
        if split.before.past_S is not None:
            crosses_S &= split.before.past_S <= point
        if point == 0 or not bool(crosses_S.any()):
            return remembered
        if memory is None:
            keys, values, steps = (split.before.to_grid(t) for t in (before[:, 1], before[:, 2], steps))
        else:
            keys, values, steps = (memory.tensors[name][:, :point] for name in ("keys", "values", "steps"))
        if bool(crosses_S.all()):
            return convert_memory(keys, values, steps, A_K)
        rows = crosses_S.nonzero().squeeze(1)
        converted = convert_memory(keys[rows], values[rows], steps[rows], A_K)
        if remembered is None:
            remembered = converted.new_zeros(split.num_sequences, *converted.shape[1:])
        return remembered.index_copy(0, rows, converted)


def convert_memory(keys_SPKN: Tensor, values_SPKP: Tensor, steps_SPK: Tensor, A_K: Tensor) -> Tensor:
    """The Memory Converter: what a scan over these keys and values would hold after the last of them.

    The printed formula leaves Δ out, by which the scan multiplies each input; without it the scan goes on wrongly.

    Args:
        keys_SPKN, values_SPKP: before rotary positions; steps_SPK: Δ; A_K: negative.

    Returns:
        (S, K, P, N), in at least fp32.
    """
    dtype = torch.promote_types(steps_SPK.dtype, torch.float32)
    decay_SPK = steps_SPK.to(dtype) * A_K.to(dtype)
    # summed from the end, so that the latest tokens, which weigh most, have the smallest sums
    to_end_SPK = F.pad(decay_SPK[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 1))
    weights_SPK = to_end_SPK.exp() * steps_SPK
    with torch.autocast(keys_SPKN.device.type, enabled=False):
        # PAPER TransMamba Eq. 9: h = (A× ∘ Kᵀ)(Δ ∘ V), its last row
        weighted = (values_SPKP * weights_SPK.unsqueeze(-1).to(values_SPKP.dtype)).transpose(1, 2)
        return (weighted.mT @ keys_SPKN.transpose(1, 2)).to(dtype)
