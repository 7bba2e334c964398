"""The Mamba-2 mixer: a scan whose decay is one number a head (Dao and Gu 2024).

Shape suffixes: T new tokens, S sequences, H hidden, E inner, K heads, P head width, N state.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mabert.causal_config import HybridConfig
from mabert.layers.causal_conv import CausalConv
from mabert.layers.memory import LayerMemory
from mabert.layers.norm import RMSNorm
from mabert.ops import SequenceLayout, ssd


class Mamba2Mixer(nn.Module):
    """Convolution, scan, skip, gate and norm."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        inner, state, heads = config.inner_size, config.state_size, config.inner_size // config.mamba_head_size
        self.head_size = config.mamba_head_size
        self.sizes, self.conv_sizes = [inner, inner + 2 * state, heads], [inner, state, state]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.conv = CausalConv(sum(self.conv_sizes), config.conv_kernel)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(inner, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, H) to (T, H). Remembers `state` (S, K, P, N)."""
        layout = layout.recurrence
        z_TE, xBC, delta_TK = self.in_proj(x_TH).split(self.sizes, dim=-1)
        x_TE, B_TN, C_TN = self.conv(xBC, layout, memory).split(self.conv_sizes, dim=-1)
        x_TKP = x_TE.unflatten(-1, (-1, self.head_size))
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        y_1TKP, state = ssd(
            x_TKP[None],
            F.softplus(delta_TK.to(dtype) + self.dt_bias.to(dtype))[None],
            -torch.exp(self.A_log.to(dtype)),
            B_TN[None, :, None],
            C_TN[None, :, None],
            cu_seqlens=layout.cu_seqlens,
            initial_state=memory.get("state") if memory is not None else None,
            return_final_state=True,
        )
        if memory is not None:
            memory.keep("state", state)
        y_TE = (y_1TKP[0] + self.D.to(x_TKP.dtype).unsqueeze(-1) * x_TKP).flatten(-2)
        return self.out_proj(self.norm(y_TE * F.silu(z_TE)))
