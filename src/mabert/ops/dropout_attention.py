"""Attention that drops some of its weights, on a CPU: a few scores at a time, written out again for the gradients.

torch's own attention writes out all scores once it drops any, passes over them many times, and draws them one by one.

Shape suffixes: N heads of all rows, L queries and keys, P head width; n, l, m of a piece.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCORES_AT_ONCE = 2**19
"""So many scores are held at a time, at most, or those of one query: as many as stay in a core's cache."""
DRAWS = 2**15
"""A weight is dropped by 15 random bits: the probability is rounded to a multiple of 1/32768."""

Piece = tuple[slice, slice, slice]
"""Heads, queries, and the keys that these can see."""


def dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """dropout(softmax(query keyᵀ / √P)) value, with no more than `SCORES_AT_ONCE` scores held at any time.

    What is dropped is drawn from a seed that comes from torch's generator. Gradients of gradients are refused.

    Args:
        query, key, value: (B, K, L, P) floating point, on a CPU.
        dropout: 0 <= dropout < 1.
        mask: (B, L) bool, True where a key may be seen; at least one in each row.
        is_causal: a query sees the keys up to and with its own.
        window: so many of them at most, counted from its own backwards; only with `is_causal`.

    Returns:
        (B, K, L, P), in the dtype of query.

    Raises:
        ValueError: the tensors are not on a CPU, the dropout is out of its range, or a window is given without
            `is_causal`.
    """
    if query.device.type != "cpu":
        raise ValueError(f"dropout_attention runs on a CPU, not on {query.device}: take scaled_dot_product_attention.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}.")
    if window is not None and not is_causal:
        raise ValueError("a window counts backwards from a query's own place: it needs is_causal=True.")
    heads = query.shape[1]
    hidden_NL = None if mask is None else ~mask.repeat_interleave(heads, dim=0)
    dropped = min(round(dropout * DRAWS), DRAWS - 1)
    seed = int(torch.randint(2**62, ()))
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    output = _DropoutAttention.apply(*flat, hidden_NL, dropped, seed, is_causal, window)
    return output.unflatten(0, (-1, heads))


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_NLP: Tensor,
        key_NLP: Tensor,
        value_NLP: Tensor,
        hidden_NL: Tensor | None,
        dropped: int,
        seed: int,
        is_causal: bool,
        window: int | None,
    ) -> Tensor:
        """Piece by piece; the weights are not kept."""
        ctx.choices = dropped, seed, is_causal, window
        output_NLP = torch.empty_like(query_NLP)
        with torch.autocast("cpu", enabled=False):
            for piece, weights, drop in _weights(query_NLP, key_NLP, hidden_NL, dropped, seed, is_causal, window):
                heads, queries, keys = piece
                output_NLP[heads, queries] = weights.masked_fill_(drop, 0) @ value_NLP[heads, keys]
        output_NLP *= _scale(dropped)
        ctx.save_for_backward(query_NLP, key_NLP, value_NLP, hidden_NL, output_NLP)
        return output_NLP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput_NLP: Tensor) -> tuple[Tensor | None, ...]:
        """The same weights and drops once more, and from them the gradients."""
        query_NLP, key_NLP, value_NLP, hidden_NL, output_NLP = ctx.saved_tensors
        wide = torch.promote_types(query_NLP.dtype, torch.float32)
        dquery_NLP = torch.empty_like(query_NLP)
        dkey_NLP, dvalue_NLP = (torch.zeros_like(x, dtype=wide) for x in (key_NLP, value_NLP))
        doutput_NLP = doutput_NLP.contiguous()
        # softmax's gradient takes from each score the mean of its query's gradients; that is output · doutput
        means_NL1 = (output_NLP.to(wide) * doutput_NLP).sum(dim=-1, keepdim=True).to(query_NLP.dtype)
        doutput_NLP = doutput_NLP * _scale(ctx.choices[0])
        for piece, weights, drop in _weights(query_NLP, key_NLP, hidden_NL, *ctx.choices):
            heads, queries, keys = piece
            doutput_nlP = doutput_NLP[heads, queries]
            dweights = (doutput_nlP @ value_NLP[heads, keys].mT).masked_fill_(drop, 0)
            dscores = dweights.sub_(means_NL1[heads, queries]).mul_(weights)
            dquery_NLP[heads, queries] = dscores @ key_NLP[heads, keys]
            dkey_NLP[heads, keys] += dscores.mT @ query_NLP[heads, queries]
            dvalue_NLP[heads, keys] += weights.masked_fill_(drop, 0).mT @ doutput_nlP
        scale = query_NLP.shape[-1] ** -0.5
        dquery_NLP.mul_(scale)
        return dquery_NLP, dkey_NLP.mul_(scale).to(key_NLP.dtype), dvalue_NLP.to(value_NLP.dtype), *[None] * 5


def _weights(
    query_NLP: Tensor,
    key_NLP: Tensor,
    hidden_NL: Tensor | None,
    dropped: int,
    seed: int,
    is_causal: bool,
    window: int | None,
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """The pieces, always in the same order: attention's weights (n, l, m) and which of them are dropped."""
    generator = torch.Generator().manual_seed(seed)
    scale = query_NLP.shape[-1] ** -0.5
    heads_in_all, length = query_NLP.shape[:2]
    for piece in _pieces(heads_in_all, length, is_causal, window):
        heads, queries, keys = piece
        scores = torch.bmm(query_NLP[heads, queries] * scale, key_NLP[heads, keys].mT)
        if hidden_NL is not None:
            scores.masked_fill_(hidden_NL[heads, None, keys], -torch.inf)
        if is_causal:
            scores.masked_fill_(~sees(*_places(queries, keys), window), -torch.inf)
        yield piece, scores.softmax(dim=-1), _bits(scores.shape, generator) < dropped


def _pieces(heads: int, length: int, is_causal: bool, window: int | None) -> Iterator[Piece]:
    at_once = max(1, SCORES_AT_ONCE // max(1, length**2))
    rows = max(1, min(length, SCORES_AT_ONCE // max(1, length)))
    for head in range(0, heads, at_once):
        for start in range(0, length, rows):
            end = min(start + rows, length)
            first = 0 if window is None else max(0, start - window + 1)
            yield slice(head, head + at_once), slice(start, end), slice(first, end if is_causal else length)


def _places(queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
    return torch.arange(queries.start, queries.stop)[:, None], torch.arange(keys.start, keys.stop)


def _bits(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """15 random bits each, int16: four from every draw of the generator, which has 63."""
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(generator=generator)
    return draws.view(torch.int16)[: shape.numel()].view(shape).bitwise_and_(DRAWS - 1)


def _scale(dropped: int) -> float:
    return DRAWS / (DRAWS - dropped)


def sees(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether queries at these indices see keys at those (broadcast): up to their own, `window` of them at most."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
