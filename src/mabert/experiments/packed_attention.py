"""transformers' models over several sequences in one row, without pads: torch's variable-length attention for them.

It is for models whose attention goes through transformers' interface and is handed the model's keywords; those with an
attention of their own (Longformer, BigBird, DeBERTa) cannot be packed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig

PACKED_ATTENTION = "packed_sequences"


def can_be_packed(config: PreTrainedConfig) -> bool:
    """Whether `pack` makes an input for models with this config, once they attend by `PACKED_ATTENTION`."""
    return config.model_type in ("bert", "albert", "modernbert")


def pack(ids_BL: Tensor, lengths: list[int]) -> dict[str, Any]:
    """The first tokens of each row behind one another, and where each sequence ends, in transformers' words."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat([row[:length] for row, length in zip(ids_BL, lengths, strict=True)])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within each sequence: (1, K, T, P) to (1, T, K, P). It drops nothing, and its scale is P^-1/2."""
    # transformers counts the token itself, torch what lies to each side of it.
    window: dict[str, Any] = {} if sliding_window is None else {"window_size": (sliding_window - 1, sliding_window - 1)}
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    ends, longest = cu_seq_lens_q, max_length_q
    output = varlen_attn(query, key, value, ends, ends, longest, longest, **window)
    assert isinstance(output, Tensor)
    return output[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
