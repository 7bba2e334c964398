"""Self-attention over the sequences of a layout, through transformers' attention interface.

Shape suffixes: B batch, L length, T real tokens in all, S sequences, H hidden, K heads, P head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mabert.config import MaBertConfig
from mabert.ops import SequenceLayout
from mabert.ops.dropout_attention import dropout_attention, sees

# What packed attention costs on a CPU, in units of a query meeting a key in one feature: a call of its own for a
# sequence, and one feature of a place in the grid copied. Chosen for the least time lost over the mixtures of lengths
# that benchmarks/kernels.py measures.
CALL_COST = 4e5
COPY_COST = 16.0


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attention with its scores written out: (B, K, L, P) to (B, L, K, P), and the weights (B, K, L, L)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Softmax attention among the real tokens of each sequence, by the kernel that suits the layout; no parameters.

    Args:
        is_causal: a query sees the keys up to and with its own.
        window: so many of them at most, counted from its own backwards; None for all.
    """

    def __init__(self, config: PreTrainedConfig, *, is_causal: bool = False, window: int | None = None):
        super().__init__()
        self.config, self.is_causal, self.window = config, is_causal, window

    def forward(self, qkv: Tensor, layout: SequenceLayout) -> Tensor:
        """(T, 3, K, P) packed or (B, L, 3, K, P) padded, to (T, K, P) or (B, L, K, P)."""
        if not layout.packed:
            return self._attend(qkv, layout.mask_BL)
        if not torch.compiler.is_compiling() and layout.num_tokens == 0:
            return qkv[:, 2]  # nobody is there to attend
        if self._flash:
            return self._attend(
                qkv[None],
                None,
                cu_seq_lens_q=layout.cu_seqlens,
                cu_seq_lens_k=layout.cu_seqlens,
                max_length_q=layout.max_length,
                max_length_k=layout.max_length,
            )[0]
        if self._sdpa and varlen_runs(qkv, self._dropout):
            query, key, value = qkv.unbind(1)
            ends, longest = layout.cu_seqlens, layout.max_length
            left, right = -1 if self.window is None else self.window - 1, 0 if self.is_causal else -1
            attended = varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(left, right))
            assert isinstance(attended, Tensor)
            return attended
        # which of the two is cheaper depends on the data: not when compiled
        if torch.compiler.is_compiling() or grid_is_cheaper(layout, qkv.shape[-2:].numel()):
            return self._attend_in_grid(qkv, layout)
        return self._attend_one_by_one(qkv, layout)

    def _attend_in_grid(self, qkv: Tensor, layout: SequenceLayout) -> Tensor:
        # behind a sequence's end stands nothing that an earlier query would see
        mask = None if self.is_causal else layout.grid_mask()
        return layout.from_grid(self._attend(layout.to_grid(qkv), mask))

    def _attend_one_by_one(self, qkv: Tensor, layout: SequenceLayout) -> Tensor:
        parts = qkv.split(layout.lengths_S.tolist())
        return torch.cat([self._attend(part[None], None)[0] for part in parts if len(part)])

    @property
    def _dropout(self) -> float:
        return self.config.attention_probs_dropout_prob if self.training else 0.0

    @property
    def _sdpa(self) -> bool:
        return self.config._attn_implementation == "sdpa"

    @property
    def _flash(self) -> bool:
        return "flash" in (self.config._attn_implementation or "")

    def _attend(self, qkv: Tensor, mask_BL: Tensor | None, **kwargs: object) -> Tensor:
        """(B, L, 3, K, P) to (B, L, K, P)."""
        query, key, value = qkv.transpose(1, 3).unbind(2)
        if mask_BL is not None and not self._flash:
            # a row of pads attends to itself: its output is dropped, but an empty softmax would be NaN
            mask_BL = mask_BL | ~mask_BL.any(dim=1, keepdim=True)
        if self._dropout and self._sdpa and qkv.device.type == "cpu" and not torch.compiler.is_compiling():
            return dropout_attention(
                query, key, value, self._dropout, mask=mask_BL, is_causal=self.is_causal, window=self.window
            ).transpose(1, 2)
        mask = mask_BL if self._flash or mask_BL is None else mask_BL[:, None, None, :]
        if self._flash and self.window is not None:
            kwargs["sliding_window"] = self.window
        if self.is_causal and not self._flash and not (self._sdpa and self.window is None):
            index = torch.arange(query.shape[2], device=qkv.device)
            mask = sees(index[:, None], index, self.window)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self._dropout,
            scaling=query.shape[-1] ** -0.5,
            is_causal=self.is_causal and mask is None,
            **kwargs,
        )
        return output

    def with_past(self, query_TKP: Tensor, key_SMKP: Tensor, value_SMKP: Tensor, layout: SequenceLayout) -> Tensor:
        """Queries of new tokens over all keys of their sequences, each at the place of its index: (T, K, P)."""
        index_SQ, index_M = layout.to_grid(layout.indices_T), torch.arange(key_SMKP.shape[1], device=key_SMKP.device)
        mask_SQM = sees(index_SQ.unsqueeze(-1), index_M, self.window)
        heads_first = (t.transpose(1, 2) for t in (layout.to_grid(query_TKP), key_SMKP, value_SMKP))
        query, key, value = heads_first
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_SQM[:, None])
        return layout.from_grid(attended.transpose(1, 2))


class SelfAttention(nn.Module):
    """Multi-head attention among the real tokens of each sequence (MHSA of Eq. 1); pad keys never enter the softmax."""

    def __init__(self, config: MaBertConfig):
        super().__init__()
        self.head_size = config.head_size
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention = Attention(config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.rope_theta = config.rope_parameters["rope_theta"] if config.position_embedding_type == "rope" else None

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """(T, H) packed or (B, L, H) padded, to the same shape."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_size))
        if self.rope_theta is not None:
            query, key, value = qkv.unbind(-3)
            cos, sin = rotary_angles(layout.positions, self.head_size, self.rope_theta, query.dtype)
            qkv = torch.stack((rotate(query, cos, sin), rotate(key, cos, sin), value), dim=-3)
        return self.out_proj(self.attention(qkv, layout).flatten(-2))


def varlen_runs(qkv: Tensor, dropout: float) -> bool:
    """Whether torch's own attention over packed sequences takes this: half precision, nothing dropped, on a GPU that
    FlashAttention knows.
    """
    if not qkv.is_cuda or dropout or qkv.dtype not in (torch.bfloat16, torch.float16):
        return False
    return qkv.shape[-1] % 8 == 0 and qkv.shape[-1] <= 256 and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


def grid_is_cheaper(layout: SequenceLayout, hidden_size: int) -> bool:
    """Whether one call over a padded grid of the sequences costs less than one call for each of them."""
    if layout.grid_indices_T is None:
        return True  # they fill the grid: nothing is copied and nothing padded
    lengths_S = layout.lengths_S
    places, longest = layout.num_sequences * layout.max_length, layout.max_length
    in_grid = CALL_COST + hidden_size * places * (longest + COPY_COST)
    one_by_one = CALL_COST * layout.num_sequences + hidden_size * int((lengths_S**2).sum())
    return in_grid <= one_by_one


def rotary_angles(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles, (..., 1, P/2) each, computed in fp32."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions.unsqueeze(-1).float() * theta**-exponents
    return angles.cos().unsqueeze(-2).to(dtype), angles.sin().unsqueeze(-2).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (first half, second half) of each head: (..., K, P)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
