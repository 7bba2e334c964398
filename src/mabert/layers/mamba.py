"""The M layer: a padding-safe Mamba-1 mixer and a feed-forward network (Eqs. 2-9).

Shape suffixes: B batch, L length, T real tokens in all, H hidden, E inner, N state, R Δ-rank, W kernel width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from mabert.config import MaBertConfig
from mabert.layers.feed_forward import FeedForward
from mabert.layers.padding import PSM, zero_pads
from mabert.ops import SequenceLayout, depthwise_conv, selective_scan


class SelectiveSSM(nn.Module):
    """Convolution, input-dependent parameters and scan in one direction (Eqs. 5-8)."""

    def __init__(self, config: MaBertConfig, reverse: bool):
        super().__init__()
        inner, state, rank = config.inner_size, config.state_size, int(config.time_step_rank)
        self.split_sizes = [rank, state, state]
        self.conv_mode = config.conv_mode
        self.reverse = reverse
        self.mask_inside = PSM[config.psm].inside_ssm
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))

    def forward(self, x_BLE: Tensor, z_BLE: Tensor | None, layout: SequenceLayout) -> Tensor:
        """(B, L, E) or (1, T, E) to the readout s, gated by z when given."""
        mask_BL = layout.mask_BL if self.mask_inside and not layout.packed else None
        cu_seqlens = layout.cu_seqlens if layout.packed else None
        # PAPER Eq. 5: x~ = SiLU(DWConv1D(x))
        x_BLE = depthwise_conv(
            x_BLE,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            mode=self.conv_mode,
            activation="silu",
            mask=mask_BL,
            cu_seqlens=cu_seqlens,
            reverse=self.reverse,
        )
        # PAPER Eq. 6: [δ ; B ; C] = W_x x~
        delta_BLR, B_BLN, C_BLN = self.x_proj(x_BLE).split(self.split_sizes, dim=-1)
        # Eqs. 7 and 8, and the gate of Eq. 9, are the scan's
        y_BLE = selective_scan(
            x_BLE,
            F.linear(delta_BLR, self.dt_proj.weight),
            -torch.exp(self.A_log.float()),  # PAPER Eq. 8: A = -exp(A_log)
            B_BLN,
            C_BLN,
            self.D.float(),
            z_BLE,
            delta_bias=self.dt_proj.bias.float(),
            mask=mask_BL,
            cu_seqlens=cu_seqlens,
            reverse=self.reverse,
        )
        assert isinstance(y_BLE, Tensor)
        return y_BLE


class MambaMixer(nn.Module):
    """The Mamba-1 block in one direction, or in both with shared in and out projections (Eqs. 4-9)."""

    def __init__(self, config: MaBertConfig, direction: str):
        super().__init__()
        # CHOICE: in and out projections without bias, as in Mamba-1
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.inner_size, bias=False)
        reverses = (False, True) if direction == "bidirectional" else (direction == "backward",)
        self.ssms = nn.ModuleList(SelectiveSSM(config, reverse) for reverse in reverses)
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """(T, H) packed or (B, L, H) padded, to the same shape."""
        u_BLH = x[None] if layout.packed else x
        # PAPER Eq. 4: [x ; z] = W_in u
        x_BLE, z_BLE = self.in_proj(u_BLH).chunk(2, dim=-1)
        if len(self.ssms) == 1:
            y_BLE = self.ssms[0](x_BLE, z_BLE, layout)
        else:
            # CHOICE: the two directions of a bidirectional mixer are summed before the gate
            s_BLE = self.ssms[0](x_BLE, None, layout) + self.ssms[1](x_BLE, None, layout)
            y_BLE = s_BLE * F.silu(z_BLE)
        # PAPER Eq. 9: y = W_out (s * SiLU(z))
        y_BLH = self.out_proj(y_BLE)
        return y_BLH[0] if layout.packed else y_BLH


class MambaLayer(GradientCheckpointingLayer):
    """Pre-LN residual Mamba mixer and feed-forward network with padding-safe masking."""

    def __init__(self, config: MaBertConfig, direction: str):
        super().__init__()
        self.psm = PSM[config.psm]
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MambaMixer(config, direction)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = FeedForward(config)
        # CHOICE: dropout on both residual branches
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """(T, H) packed or (B, L, H) padded, to the same shape."""
        # PAPER Eq. 2: U = m * LN(X), X' = X + SSM(U)
        u = self.mixer_norm(x)
        if self.psm.before_ssm:
            u = zero_pads(u, layout)
        x = x + self.dropout(self.mixer(u, layout))
        # PAPER Eq. 3: X+ = m * (X' + FFN(LN(X')))
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return zero_pads(x, layout) if self.psm.after_block else x
