import sys

import pytest
import torch

from mabert import MaBertConfig
from mabert.layers import attention
from mabert.layers.attention import Attention, SelfAttention, grid_is_cheaper, rotary_angles, rotate
from mabert.ops import SequenceLayout


@pytest.fixture
def layer():
    config = MaBertConfig(hidden_size=16, num_attention_heads=2, pattern="T", attn_implementation="sdpa")
    torch.manual_seed(0)
    return SelfAttention(config).eval()


def layout_of(lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return SequenceLayout.build(1, sum(lengths), "cpu", packed=True, cu_seq_lens=cu)


def test_grid_and_one_call_a_sequence_agree_and_the_cheaper_one_is_taken(layer, monkeypatch):
    calls = []
    attend = Attention._attend
    monkeypatch.setattr(
        Attention, "_attend", lambda self, qkv, *a, **k: calls.append(qkv.shape) or attend(self, qkv, *a, **k)
    )
    lengths = [5, 0, 1, 9, 2]
    x = torch.randn(17, 16)
    grid = layer(x, layout_of(lengths))
    assert [tuple(c[:2]) for c in calls] == [(5, 9)]
    calls.clear()
    monkeypatch.setattr(attention, "CALL_COST", 1.0)
    one_by_one = layer(x, layout_of(lengths))
    assert [tuple(c[:2]) for c in calls] == [(1, 5), (1, 1), (1, 9), (1, 2)]
    torch.testing.assert_close(grid, one_by_one)
    calls.clear()
    layer(torch.randn(18, 16), SequenceLayout.build(2, 9, "cpu", packed=True))
    assert [tuple(c[:2]) for c in calls] == [(2, 9)]


@pytest.mark.parametrize(
    ("lengths", "in_grid"),
    [([16] * 64, True), ([12, 16, 14, 10], True), ([512] + [16] * 63, False), ([4096, 8, 8, 8], False)],
)
def test_a_long_sequence_does_not_pad_its_short_neighbours(lengths, in_grid):
    assert grid_is_cheaper(layout_of(lengths), hidden_size=768) == in_grid


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_packed_attention_needs_no_memory_that_grows_with_the_square_of_the_length(peak_memory_of, dropout):
    """4,096 tokens in one sequence beside many short ones: scores alone would take 4096² · 4 heads · 4 bytes = 256 MiB,
    four times that with their gradients and dropout, and a grid 64 times the tokens."""
    grown = peak_memory_of(
        f"""
        import torch
        from mabert import MaBertConfig
        from mabert.layers.attention import SelfAttention
        from mabert.ops import SequenceLayout

        layer = SelfAttention(MaBertConfig(hidden_size=64, num_attention_heads=4, attn_implementation="sdpa"))
        lengths = [4096] + [8] * 63
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        layout = SequenceLayout.build(1, sum(lengths), "cpu", packed=True, cu_seq_lens=cu)
        x = torch.randn(sum(lengths), 64, requires_grad=True)
        layer.attention.config.attention_probs_dropout_prob = {dropout}
        measured(lambda: layer(x, layout).sum().backward())
        """
    )
    assert grown < 256 * 2**20


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_on_a_cpu_spares_what_is_not_seen(layer, monkeypatch, packed):
    """With next to nothing dropped it is attention without dropout, for rows with pads too; with more every token of a
    sequence is touched. Written-out attention and other modes are left alone."""
    calls = []
    own = attention.dropout_attention
    monkeypatch.setattr(attention, "dropout_attention", lambda *a, **k: calls.append(k["mask"]) or own(*a, **k))
    mask = torch.tensor([[1, 1, 1, 1, 0], [0] * 5, [0, 0, 1, 1, 1]]).bool()
    layout = SequenceLayout.build(3, 5, "cpu", packed=packed, attention_mask=mask)
    x = torch.randn(3, 5, 16)
    x = x[mask] if packed else x
    expected = layer(x, layout)

    def trained(dropout):
        monkeypatch.setattr(layer.attention.config, "attention_probs_dropout_prob", dropout)
        return layer.train()(x, layout)

    # a row of pads attends to itself, and its output is dropped later
    torch.testing.assert_close(trained(1e-9), expected)
    changed = (trained(0.6) != expected).any(dim=-1)
    assert changed.float().mean() > 0.5
    assert len(calls) == 2
    layer.eval()(x, layout)
    layer.attention.config._attn_implementation = "eager"
    layer.train()(x, layout)
    assert len(calls) == 2


def test_no_softmax_is_empty(layer, monkeypatch):
    masks = []

    def interface(module, query, key, value, mask, **kwargs):
        masks.append(mask)
        return value.transpose(1, 2), None

    monkeypatch.setattr(attention.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *a: interface)
    mask = torch.tensor([[True, False], [False, False]])
    layer(torch.randn(2, 2, 16), SequenceLayout.build(2, 2, "cpu", packed=False, attention_mask=mask))
    assert masks[0].shape == (2, 1, 1, 2)
    assert masks[0][:, 0, 0].tolist() == [[True, False], [True, True]]


def test_flash_attention_gets_the_boundaries_and_no_mask(layer, monkeypatch):
    seen = {}

    def interface(module, query, key, value, mask, **kwargs):
        seen.update(kwargs, mask=mask, shape=query.shape)
        return value.transpose(1, 2), None

    monkeypatch.setattr(attention.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *a: interface)
    layer.attention.config._attn_implementation = "flash_attention_2"
    layer(torch.randn(17, 16), layout_of([5, 0, 1, 9, 2]))
    assert seen["cu_seq_lens_q"].tolist() == seen["cu_seq_lens_k"].tolist() == [0, 5, 5, 6, 15, 17]
    assert seen["max_length_q"] == seen["max_length_k"] == 9
    assert seen["mask"] is None
    assert seen["is_causal"] is False
    assert seen["shape"] == (1, 2, 17, 8)


def test_packed_attention_in_half_precision_on_a_gpu_is_torchs_own(layer, monkeypatch):
    seen = []

    def varlen(query, key, value, starts, ends, *longest, window_size):
        seen.append((query.shape, starts.tolist(), ends.tolist(), longest, window_size))
        return value

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "varlen_runs", lambda qkv, dropout: dropout == 0)
    layer(torch.randn(17, 16), layout_of([5, 0, 1, 9, 2]))
    assert seen == [((17, 2, 8), [0, 5, 5, 6, 15, 17], [0, 5, 5, 6, 15, 17], (9, 9), (-1, -1))]
    layer.attention.config.attention_probs_dropout_prob = 0.1
    layer.train()(torch.randn(17, 16), layout_of([5, 0, 1, 9, 2]))
    layer.attention.config._attn_implementation = "eager"
    layer.eval()(torch.randn(17, 16), layout_of([5, 0, 1, 9, 2]))
    assert len(seen) == 1


def test_what_torchs_packed_attention_takes():
    qkv = torch.empty(4, 3, 2, 64, dtype=torch.bfloat16)
    assert not attention.varlen_runs(qkv, 0.0)  # on a CPU
    if torch.cuda.is_available():
        assert attention.varlen_runs(qkv.cuda(), 0.0)
        assert not attention.varlen_runs(qkv.cuda(), 0.1)
        assert not attention.varlen_runs(qkv.cuda().float(), 0.0)


def test_rotation_depends_on_relative_position_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def score(i, j):
        rotated = [rotate(t, *rotary_angles(torch.tensor([p]), 8, 100.0, torch.float64)) for t, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(14, 10), rtol=1e-5, atol=1e-6)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3
    torch.testing.assert_close(score(5, 5), (q * k).sum(), rtol=1e-6, atol=1e-6)
