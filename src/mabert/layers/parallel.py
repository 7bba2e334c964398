"""Attention and SSM side by side on the same input, and ways to make one output of the two.

After arXiv 2510.26912, of which it is known that it fuses by attention; the other fusions stand here beside that.

Shape suffixes: B batch, L length, T real tokens in all, H hidden, K heads, P head width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mabert.config import MaBertConfig
from mabert.layers.attention import Attention, SelfAttention
from mabert.layers.feed_forward import FeedForward
from mabert.layers.mamba import MambaMixer
from mabert.layers.memory import LayerMemory
from mabert.layers.padding import PSM, zero_pads
from mabert.ops import SequenceLayout

MakeNorm = Callable[[int], nn.Module]
"""From a width to a norm of it, as the model's other ones are."""


class ParallelMixer(nn.Module):
    """s = SSM(u) and a = Attention(u), fused."""

    def __init__(self, attention: nn.Module, ssm: nn.Module, fusion: nn.Module):
        super().__init__()
        self.attention, self.ssm, self.fusion = attention, ssm, fusion

    def forward(self, u: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, H) packed or (B, L, H) padded, to the same shape."""
        remembers = () if memory is None else (memory,)
        a, s = self.attention(u, layout, *remembers), self.ssm(u, layout, *remembers)
        return self.fusion(u, a, s, layout, *remembers)


class ParallelLayer(GradientCheckpointingLayer):
    """MaBERT's P layer: Pre-LN residual attention and Mamba side by side, and a feed-forward network."""

    def __init__(self, config: MaBertConfig, direction: str):
        super().__init__()
        self.psm = PSM[config.psm]
        norm = partial(nn.LayerNorm, eps=config.layer_norm_eps)
        self.mixer_norm = norm(config.hidden_size)
        fusion = make_fusion(config.fusion, config, norm, is_causal=False, window=None)
        self.mixer = ParallelMixer(SelfAttention(config), MambaMixer(config, direction), fusion)
        self.ffn_norm = norm(config.hidden_size)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """(T, H) packed or (B, L, H) padded, to the same shape; masked where an M layer is."""
        u = self.mixer_norm(x)
        if self.psm.before_ssm:
            u = zero_pads(u, layout)
        x = x + self.dropout(self.mixer(u, layout))
        x = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return zero_pads(x, layout) if self.psm.after_block else x


class MeanFusion(nn.Module):
    """(N(s) + N(a)) / 2, each with a norm of its own."""

    def __init__(self, config: PreTrainedConfig, norm: MakeNorm):
        super().__init__()
        self.attention_norm, self.ssm_norm = norm(config.hidden_size), norm(config.hidden_size)

    def forward(
        self, u: Tensor, a: Tensor, s: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None
    ) -> Tensor:
        """(..., H) each."""
        return (self.ssm_norm(s) + self.attention_norm(a)) / 2


class ScaledFusion(nn.Module):
    """W(β₁ ⊙ N(a) + β₂ ⊙ N(s)), as in Hymba."""

    def __init__(self, config: PreTrainedConfig, norm: MakeNorm):
        super().__init__()
        width = config.hidden_size
        self.attention_norm, self.ssm_norm = norm(width), norm(width)
        self.attention_scale, self.ssm_scale = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self, u: Tensor, a: Tensor, s: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None
    ) -> Tensor:
        """(..., H) each."""
        return self.proj(self.attention_scale * self.attention_norm(a) + self.ssm_scale * self.ssm_norm(s))


class GateFusion(nn.Module):
    """g ⊙ a + (1 − g) ⊙ s with g = σ(W_g u + b): 1 is attention alone, 0 the SSM alone."""

    def __init__(self, config: PreTrainedConfig, norm: MakeNorm):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, u: Tensor, a: Tensor, s: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None
    ) -> Tensor:
        """(..., H) each."""
        return torch.lerp(s, a, self.gate(u).sigmoid().to(s.dtype))


class ConcatFusion(nn.Module):
    """W[N(a); N(s)]."""

    def __init__(self, config: PreTrainedConfig, norm: MakeNorm):
        super().__init__()
        width = config.hidden_size
        self.attention_norm, self.ssm_norm = norm(width), norm(width)
        self.proj = nn.Linear(2 * width, width, bias=False)

    def forward(
        self, u: Tensor, a: Tensor, s: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None
    ) -> Tensor:
        """(..., H) each."""
        return self.proj(torch.cat((self.attention_norm(a), self.ssm_norm(s)), dim=-1))


class MergeAttention(nn.Module):
    """Multi-head attention whose queries come from one branch and whose keys and values come from the other.

    The queries are attention's, or with `swapped` the SSM's. For `is_causal` and `window` see `Attention`.
    """

    def __init__(
        self, config: PreTrainedConfig, norm: MakeNorm, *, is_causal: bool, window: int | None, swapped: bool = False
    ):
        super().__init__()
        width = config.hidden_size
        self.swapped, self.head_size = swapped, config.head_size
        self.query_norm, self.key_norm = norm(width), norm(width)
        self.query_proj = nn.Linear(width, width, bias=False)
        self.key_value_proj = nn.Linear(width, 2 * width, bias=False)
        # CHOICE: without rotary positions, since both branches know where they are
        self.attention = Attention(config, is_causal=is_causal, window=window)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, u: Tensor, a: Tensor, s: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None
    ) -> Tensor:
        """(..., H) each. Remembers `merge_keys` and `merge_values` (S, M, K, P)."""
        layout = layout.reach
        asking, asked = (s, a) if self.swapped else (a, s)
        query = self.query_proj(self.query_norm(asking)).unflatten(-1, (-1, self.head_size))
        key_value = self.key_value_proj(self.key_norm(asked)).unflatten(-1, (2, -1, self.head_size))
        if not torch.compiler.is_compiling() and not layout.num_tokens:
            return self.out_proj(query.flatten(-2))  # none of the rows has a token here
        if memory is not None:
            key, value = key_value.unbind(-3)
            memory.write(layout, merge_keys=key, merge_values=value)
        if memory is None or layout.past_S is None:
            y = self.attention(torch.cat((query.unsqueeze(-3), key_value), dim=-3), layout)
        else:
            keys, values = memory.tensors["merge_keys"], memory.tensors["merge_values"]
            y = self.attention.with_past(query, keys, values, layout)
        return self.out_proj(y.flatten(-2))


def make_fusion(
    name: str, config: PreTrainedConfig, norm: MakeNorm, *, is_causal: bool, window: int | None
) -> nn.Module:
    """The fusion of that name, one of `mabert.config.FUSIONS`; one that attends does so as the branch beside it.

    For `is_causal` and `window` see `Attention`.
    """
    if name.startswith("merge-attention"):
        swapped = name.endswith("-swapped")
        return MergeAttention(config, norm, is_causal=is_causal, window=window, swapped=swapped)
    kinds = {"mean": MeanFusion, "gate": GateFusion, "scaled": ScaledFusion, "concat": ConcatFusion}
    return kinds[name](config, norm)
