"""Causal self-attention with rotary positions.

Shape suffixes: T new tokens, S sequences, M tokens remembered at most, H hidden, K heads, P head width.
"""

import torch
from torch import Tensor, nn

from mabert.causal_config import CausalConfig
from mabert.layers.attention import Attention, rotary_angles, rotate
from mabert.layers.memory import LayerMemory
from mabert.ops import SequenceLayout


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it in its sequence, or a window of them."""

    def __init__(self, config: CausalConfig, window: int | None = None):
        super().__init__()
        self.head_size = config.head_size
        self.rope_theta = config.rope_parameters["rope_theta"]
        # CHOICE: no biases in the projections, as in Mamba's
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.attention = Attention(config, is_causal=True, window=window)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, H) to (T, H). Remembers `keys` and `values` (S, M, K, P)."""
        layout = layout.reach
        query, key, value = self.qkv_proj(x_TH).unflatten(-1, (3, -1, self.head_size)).unbind(1)
        if not torch.compiler.is_compiling() and not layout.num_tokens:
            return self.out_proj(value.flatten(-2))  # none of the rows has a token here
        cos, sin = rotary_angles(layout.positions, self.head_size, self.rope_theta, query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if memory is not None:
            memory.write(layout, keys=key, values=value)
        if memory is None or layout.past_S is None:
            y_TKP = self.attention(torch.stack((query, key, value), dim=1), layout)
        else:
            y_TKP = self.attention.with_past(query, memory.tensors["keys"], memory.tensors["values"], layout)
        return self.out_proj(y_TKP.flatten(-2))
