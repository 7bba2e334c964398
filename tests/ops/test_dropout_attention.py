"""Attention with dropout on a CPU: torch's where nothing is dropped, and what is dropped."""

import pytest
import torch
from torch.nn import functional as F

from mabert.ops import dropout_attention as module
from mabert.ops.dropout_attention import dropout_attention, sees

B, K, L, P = 2, 3, 11, 8
MASK = torch.ones(B, L, dtype=torch.bool)
MASK[0, 7:] = MASK[1, :2] = False
CHOICES = {
    "all": {},
    "pads": {"mask": MASK},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 4},
}


def heads(dtype=torch.float64, length=L, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, K, length, P, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def seen(mask=None, is_causal=False, window=None, length=L):
    """(B, 1, L, L) bool, written out."""
    index = torch.arange(length)
    pairs = sees(index[:, None], index, window) if is_causal else torch.ones(length, length, dtype=torch.bool)
    return pairs[None, None] & (torch.ones(B, length, dtype=torch.bool) if mask is None else mask)[:, None, None]


def dropped_weights(query, key, dropout, **choices):
    """(B, K, L, L): with one-hot values the outputs are the weights themselves."""
    length = query.shape[2]
    value = torch.eye(length, dtype=query.dtype).expand(*query.shape[:2], -1, -1)
    wide = [F.pad(x, (0, length - P)) * (length / P) ** 0.25 for x in (query, key)]
    return dropout_attention(*wide, value, dropout, **choices)


@pytest.fixture(params=[2**19, 2 * L * L, 3 * L, 1], ids=["whole", "two heads", "three queries", "one query"])
def scores_at_once(request, monkeypatch):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", request.param)


@pytest.mark.parametrize("name", CHOICES)
def test_with_nothing_dropped_it_is_torchs_attention(name, scores_at_once):
    tensors, choices = heads(), CHOICES[name]
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=seen(**choices))
    actual = dropout_attention(*tensors, 0.0, **choices)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, weights),
        torch.autograd.grad(expected, tensors, weights),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", CHOICES)
def test_gradients_are_those_of_what_was_not_dropped(name, scores_at_once):
    """By differences, and the drops drawn from one seed."""

    def seeded(*tensors):
        torch.manual_seed(5)
        return dropout_attention(*tensors, 0.4, **CHOICES[name])

    assert torch.autograd.gradcheck(seeded, heads(length=L), fast_mode=True)


@pytest.mark.parametrize("name", CHOICES)
def test_a_weight_is_dropped_or_grows_by_what_the_others_leave(name, scores_at_once):
    query, key, _ = heads()
    pairs = seen(**CHOICES[name]).expand(B, K, L, L)
    whole = dropped_weights(query, key, 0.0, **CHOICES[name])
    torch.manual_seed(0)
    some = dropped_weights(query, key, 0.25, **CHOICES[name])
    assert (some[~pairs] == 0).all()
    kept = some != 0
    torch.testing.assert_close(some[kept], whole[kept] / 0.75)
    assert 0.15 < 1 - kept[pairs].double().mean() < 0.35


def test_every_weight_is_dropped_equally_often_and_the_mean_stays():
    """Of 4,000 draws of 0.1 the share is within 0.02 (four standard deviations); and no two weights share theirs."""
    query, key, _ = (x.detach().float() for x in heads())
    torch.manual_seed(0)
    draws = torch.stack([dropped_weights(query, key, 0.1) for _ in range(4000)])
    shares = (draws == 0).float().mean(dim=0)
    assert (shares - 0.1).abs().max() < 0.02
    torch.testing.assert_close(draws.mean(dim=0), dropped_weights(query, key, 0.0), rtol=0.03, atol=0)
    together = torch.corrcoef((draws[:, 0, 0] == 0).float().flatten(1).T).fill_diagonal_(0)
    assert together.abs().max() < 0.08


def test_the_drops_come_from_torchs_generator():
    tensors = heads(torch.float32)
    torch.manual_seed(1)
    first, second = dropout_attention(*tensors, 0.3), dropout_attention(*tensors, 0.3)
    torch.manual_seed(1)
    assert torch.equal(dropout_attention(*tensors, 0.3), first)
    assert not torch.equal(first, second)


def test_half_precision_is_as_near_as_torchs():
    exact = heads(length=64)
    expected = F.scaled_dot_product_attention(*exact)
    halves = [x.detach().bfloat16().requires_grad_() for x in exact]
    weights = torch.randn_like(expected)

    def errors(attention):
        output = attention(*halves)
        gradients = torch.autograd.grad(output, halves, weights.bfloat16())
        true = torch.autograd.grad(expected, exact, weights, retain_graph=True)
        pairs = [(output, expected), *zip(gradients, true, strict=True)]
        assert all(a.dtype == torch.bfloat16 for a, _ in pairs)
        return [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in pairs]

    ours = errors(lambda *qkv: dropout_attention(*qkv, 0.0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = errors(F.scaled_dot_product_attention)
    assert all(a < 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_nothing_to_attend_to():
    none = [torch.empty(B, K, 0, P, requires_grad=True) for _ in range(3)]
    assert dropout_attention(*none, 0.1).shape == (B, K, 0, P)
    none = [torch.empty(0, K, L, P, requires_grad=True) for _ in range(3)]
    output = dropout_attention(*none, 0.1)
    assert output.shape == (0, K, L, P)
    output.sum().backward()


def test_what_it_does_not_take():
    tensors = heads()
    with pytest.raises(ValueError, match="below 1, not 1"):
        dropout_attention(*tensors, 1.0)
    with pytest.raises(ValueError, match="needs is_causal"):
        dropout_attention(*tensors, 0.1, window=3)
    with pytest.raises(ValueError, match="runs on a CPU, not on meta"):
        dropout_attention(*(x.to("meta") for x in tensors), 0.1)
    output = dropout_attention(*tensors, 0.1)
    (first,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
