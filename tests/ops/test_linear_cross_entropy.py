"""The loss without its logits is the loss, and its gradients are the gradients."""

import sys

import pytest
import torch
from torch.nn import functional as F

from mabert.ops import linear_cross_entropy as module
from mabert.ops.linear_cross_entropy import linear_cross_entropy


def inputs(dtype=torch.float64, tokens=13, vocab=17, hidden=5):
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    return x, weight, torch.randint(vocab, (tokens,))


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float() if x.dtype != torch.float64 else F.linear(x, weight), targets,
                           reduction="sum")  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 17, 50, 2**24])
def test_loss_and_gradients_in_any_pieces(monkeypatch, at_once):
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(module, "LEAST_TOKENS", 1)
    x, weight, targets = inputs()
    for function in (linear_cross_entropy, plain):
        loss = function(x, weight, targets)
        gradients = torch.autograd.grad(loss * 0.3, (x, weight))
        if function is linear_cross_entropy:
            ours = (loss, *gradients)
    torch.testing.assert_close(ours, (loss, *gradients))


def test_gradients_are_those_of_differences():
    x, weight, targets = inputs(tokens=4, vocab=6, hidden=3)
    assert torch.autograd.gradcheck(lambda x, weight: linear_cross_entropy(x, weight, targets), (x, weight))


def test_autocast_is_as_good_as_that_of_the_plain_loss():
    x, weight, targets = inputs(torch.float32, 200, 300, 64)
    exact = (plain(x.double(), weight.double(), targets), *torch.autograd.grad(plain(x, weight, targets), (x, weight)))
    errors = []
    for function in (linear_cross_entropy, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, weight, targets)
        found = (loss, *torch.autograd.grad(loss, (x, weight)))
        assert loss.dtype == torch.float32
        assert [g.dtype for g in found[1:]] == [torch.float32] * 2
        errors.append([(f.double() - e.double()).abs().max() for f, e in zip(found, exact, strict=True)])
    assert all(ours <= 2 * theirs for ours, theirs in zip(*errors, strict=True))
    assert errors[1][1] > 0


def test_without_gradients_none_are_made():
    x, weight, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(x, weight, targets).detach())


def test_no_tokens_have_no_loss():
    x, weight, targets = inputs(tokens=0)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss == 0
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert dx.shape == (0, 5)
    assert (dweight == 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_logits_are_never_held_all_at_once(peak_memory_of):
    """8,192 tokens of a vocabulary of 30,000 would take 940 MiB of logits, and as much again for their gradients."""
    grown = peak_memory_of(
        """
        import torch
        from mabert.ops.linear_cross_entropy import linear_cross_entropy

        x = torch.randn(8192, 16, requires_grad=True)
        weight = torch.randn(30_000, 16, requires_grad=True)
        targets = torch.randint(30_000, (8192,))
        measured(lambda: linear_cross_entropy(x, weight, targets).backward())
        """
    )
    assert grown < 150 * 2**20


@pytest.mark.parametrize("change", [{"x": torch.zeros(3)}, {"weight": torch.zeros(4, 6)}, {"targets": torch.zeros(4)}])
def test_shapes_that_do_not_fit_are_named(change):
    given = {"x": torch.zeros(3, 5), "weight": torch.zeros(4, 5), "targets": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"takes x \(T, H\), weight \(V, H\) and targets \(T,\)"):
        linear_cross_entropy(**given | change)
