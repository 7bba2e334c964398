"""The Mamba-1 mixer of causal models: MaBERT's M layer without its masks, with a memory.

Shape suffixes: T new tokens, S sequences, H hidden, E inner, N state, R Δ-rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mabert.causal_config import HybridConfig
from mabert.layers.causal_conv import CausalConv
from mabert.layers.memory import LayerMemory
from mabert.ops import SequenceLayout, selective_scan


class Mamba1Mixer(nn.Module):
    """Convolution, input-dependent parameters, scan and gate."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        inner, state, rank = config.inner_size, config.state_size, int(config.time_step_rank)
        self.sizes = [rank, state, state]
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv = CausalConv(inner, config.conv_kernel)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, H) to (T, H). Remembers `state` (S, E, N)."""
        layout, dtype = layout.recurrence, torch.promote_types(x_TH.dtype, torch.float32)
        x_TE, z_TE = self.in_proj(x_TH).chunk(2, dim=-1)
        x_TE = self.conv(x_TE, layout, memory)
        delta_TR, B_TN, C_TN = self.x_proj(x_TE).split(self.sizes, dim=-1)
        y_1TE, state = selective_scan(
            x_TE[None],
            F.linear(delta_TR, self.dt_proj.weight)[None],
            -torch.exp(self.A_log.to(dtype)),
            B_TN[None],
            C_TN[None],
            self.D.to(dtype),
            z_TE[None],
            delta_bias=self.dt_proj.bias.to(dtype),
            cu_seqlens=layout.cu_seqlens,
            initial_state=memory.get("state") if memory is not None else None,
            return_final_state=True,
        )
        if memory is not None:
            memory.keep("state", state)
        return self.out_proj(y_1TE[0])
