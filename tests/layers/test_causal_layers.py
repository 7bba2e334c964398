"""The causal mixers: what they compute, and what they remember."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TransformersMixer

from mabert import HybridConfig, MaBertConfig, TransMambaConfig
from mabert.layers import attention as attention_module
from mabert.layers import transmamba
from mabert.layers.attention import Attention, rotary_angles, rotate, sees
from mabert.layers.causal_attention import CausalSelfAttention
from mabert.layers.mamba import MambaMixer
from mabert.layers.mamba1 import Mamba1Mixer
from mabert.layers.mamba2 import Mamba2Mixer
from mabert.layers.memory import LayerMemory
from mabert.layers.norm import RMSNorm
from mabert.layers.parallel import make_fusion
from mabert.layers.transmamba import TransMambaMixer, convert_memory
from mabert.ops import SequenceLayout
from mabert.ops.ssd import ssd_reference

SIZES = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "vocab_size": 50}


def randomise(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.3)
            if name.endswith("A_log"):
                parameter.sub_(2)  # decays slowly enough for early tokens to count
    return module.eval()


def rows(batch, length):
    return SequenceLayout.build(batch, length, "cpu", packed=True)


def transmamba_mixer(*points, layers=1, **choices):
    config = TransMambaConfig(**SIZES, num_hidden_layers=layers, transpoints=list(points), **choices)
    return randomise(TransMambaMixer(config, 0))


def by_hand(mixer, h_TH):
    """Queries, keys, values, steps and decays of one sequence, in plain torch."""
    config, length = mixer.config, len(h_TH)
    cbx = F.pad(mixer.cbx_proj(h_TH).T[None], (3, 0))
    cbx = F.silu(F.conv1d(cbx, mixer.conv.conv1d.weight, mixer.conv.conv1d.bias, groups=3 * config.hidden_size))
    query, key, value = cbx[0].T.reshape(length, 3, config.num_attention_heads, -1).unbind(1)
    steps = F.softplus(mixer.dt_proj(h_TH) + mixer.dt_bias)
    return query, key, value, steps, -mixer.A_log.exp()


def scanned(mixer, h_TH):
    query, key, value, steps, A = by_hand(mixer, h_TH)
    y, _ = ssd_reference(
        *(t[None].double() for t in (value, steps)), A.double(), key[None].double(), query[None].double()
    )
    return (y[0].flatten(1).float() * F.silu(mixer.z_proj(h_TH))), steps


def attended(mixer, h_TH):
    query, key, value, _, _ = by_hand(mixer, h_TH)
    turned = [rotate(t, *rotary_angles(torch.arange(len(h_TH)), 8, 10_000.0, t.dtype)) for t in (query, key)]
    scores = torch.einsum("qkp,mkp->kqm", *turned) / 8**0.5
    scores = scores.masked_fill(torch.ones(len(h_TH), len(h_TH)).triu(1).bool(), -torch.inf)
    return torch.einsum("kqm,mkp->qkp", scores.softmax(-1), value).flatten(1)


@pytest.mark.parametrize("point", [0, 1, 5, 20, 21, 400])
def test_transmamba_is_attention_up_to_the_point_and_a_full_scan_from_there(point):
    mixer, h = transmamba_mixer(point), torch.randn(21, 24)
    y = mixer(h, rows(1, 21))
    scan, _ = scanned(mixer, h)
    expected = mixer.out_proj(torch.cat((attended(mixer, h)[:point], scan[point:])))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_converter_without_steps_does_not_go_on_where_attention_ended(monkeypatch):
    mixer, h = transmamba_mixer(5), torch.randn(21, 24)
    right = mixer(h, rows(1, 21))

    def as_printed(keys, values, steps, A):
        decayed = (steps * A).cumsum(1)
        weights = (decayed[:, -1:] - decayed).exp()
        return torch.einsum("spk,spkv,spkn->skvn", weights, values, keys)

    monkeypatch.setattr(transmamba, "convert_memory", as_printed)
    wrong = mixer(h, rows(1, 21))
    assert torch.equal(wrong[:5], right[:5])
    assert (wrong - right)[5:].abs().max() > 1e-2


def test_what_follows_teaches_the_tokens_before_the_transpoint_as_a_full_scan_does():
    """The gradients of the part behind it, by way of the converter."""
    gradients = []
    for point in (0, 77):
        mixer = transmamba_mixer(point).double()
        torch.manual_seed(1)
        h = torch.randn(200, 24, dtype=torch.float64, requires_grad=True)
        (mixer(h, rows(1, 200))[100:] * torch.randn(100, 24, dtype=torch.float64)).sum().backward()
        gradients.append({"h": h.grad, **{name: p.grad for name, p in mixer.named_parameters()}})
    for name, full in gradients[0].items():
        assert full.abs().max() > 1e-3, name
        torch.testing.assert_close(gradients[1][name], full, rtol=1e-9, atol=1e-9, msg=name)
    assert gradients[0]["h"][:77].abs().max() > 1e-3


def test_the_converter_is_the_state_of_a_scan():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 40, 3, 4, dtype=torch.float64)
    steps, A = torch.rand(2, 40, 3, dtype=torch.float64), -torch.rand(3, dtype=torch.float64)
    _, state = ssd_reference(values, steps, A, keys, keys)
    torch.testing.assert_close(convert_memory(keys, values, steps, A), state)


@pytest.mark.parametrize("length", [64, 4096])
def test_the_converter_keeps_its_digits_over_long_prefixes(length):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, length, 3, 8)
    steps, A = 0.2 * torch.rand(1, length, 3), -torch.tensor([0.01, 1.0, 16.0])
    exact = convert_memory(keys.double(), values.double(), steps.double(), A.double())
    error = (convert_memory(keys, values, steps, A).double() - exact).abs().amax((0, 2, 3))
    assert (error <= 3e-6 * exact.abs().amax((0, 2, 3))).all()


def test_the_gate_does_not_touch_attention():
    mixer, h = transmamba_mixer(7), torch.randn(12, 24)
    before = mixer(h, rows(1, 12))
    with torch.no_grad():
        mixer.z_proj.weight.mul_(-1)
    after = mixer(h, rows(1, 12))
    assert torch.equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).any(dim=1).all()


def test_positions_turn_attention_and_not_the_scan():
    mixer, h, layout = transmamba_mixer(6), torch.randn(12, 24), rows(1, 12)
    stretched = replace(layout, positions=layout.positions * 3)
    one, other = mixer(h, layout), mixer(h, stretched)
    assert (one[1:6] - other[1:6]).abs().max() > 1e-3
    torch.testing.assert_close(one[6:], other[6:])


def test_a_schedule_can_change_between_two_calls():
    mixer, h = transmamba_mixer(0), torch.randn(12, 24)
    scan = mixer(h, rows(1, 12))
    mixer.config.transpoints = [12]
    torch.testing.assert_close(mixer(h, rows(1, 12)), mixer.out_proj(attended(mixer, h)), rtol=1e-5, atol=1e-5)
    mixer.config.transpoints = [0]
    assert torch.equal(mixer(h, rows(1, 12)), scan)


def test_mamba_2_is_that_of_transformers():
    config = HybridConfig(**SIZES, pattern="M", state_size=6, expand=2, mamba_head_size=8)
    ours = randomise(Mamba2Mixer(config))
    theirs = TransformersMixer(
        Mamba2Config(
            num_heads=6,
            head_dim=8,
            hidden_size=24,
            state_size=6,
            expand=2,
            n_groups=1,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            layer_norm_epsilon=config.rms_norm_eps,
            chunk_size=8,
            num_hidden_layers=1,
            time_step_limit=(0.0, float("inf")),
        ),
        layer_idx=0,
    ).eval()
    with torch.no_grad():
        theirs.in_proj.weight.copy_(ours.in_proj.weight)
        theirs.conv1d.weight.copy_(ours.conv.conv1d.weight)
        theirs.conv1d.bias.copy_(ours.conv.conv1d.bias)
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        theirs.norm.weight.copy_(ours.norm.weight)
        for name in ("dt_bias", "A_log", "D"):
            getattr(theirs, name).copy_(getattr(ours, name))
    x = torch.randn(2, 19, 24)
    torch.testing.assert_close(ours(x.flatten(0, 1), rows(2, 19)).view(2, 19, 24), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
def test_causal_attention_sees_itself_and_the_window_before(implementation, window):
    config = HybridConfig(**SIZES, pattern="T", attn_implementation=implementation)
    attention = Attention(config, is_causal=True, window=window).eval()
    torch.manual_seed(0)
    qkv = torch.randn(16, 3, 3, 8)
    cu = torch.tensor([0, 9, 10, 16], dtype=torch.int32)
    layout = SequenceLayout.build(1, 16, "cpu", packed=True, cu_seq_lens=cu)
    y = attention(qkv, layout)
    for start, end in ((0, 9), (9, 10), (10, 16)):
        query, key, value = qkv[start:end].unbind(1)
        index = torch.arange(end - start)
        distance = index[:, None] - index
        seen = (distance >= 0) & (distance < (window or 99))
        scores = (torch.einsum("qkp,mkp->kqm", query, key) / 8**0.5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(y[start:end], torch.einsum("kqm,mkp->qkp", scores.softmax(-1), value))


CU = torch.tensor([0, 9, 9, 10, 75, 90], dtype=torch.int32)
REACHES = [(False, None), (True, None), (True, 1), (True, 5)]
ON_EVERY_DEVICE = [
    pytest.param(device, dtype, tolerance, marks=marks, id=f"{device}, {dtype}")
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2))
]


def pairs(starts, left, right):
    """Which keys, at most so many before a query and behind it, a query of the same packed sequence sees."""
    index = torch.arange(int(starts[-1]), device=starts.device)
    ids, distance = torch.bucketize(index, starts[1:], right=True), index[:, None] - index
    return (ids[:, None] == ids) & (distance <= left) & (-distance <= right)


def attention_written_out(query, key, value, seen):
    scores = torch.einsum("qkp,mkp->kqm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("kqm,mkp->qkp", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.fixture
def torchs_packed_attention(monkeypatch):
    """Gives what it was called with. A CPU has none, and gets what its documentation says."""
    called, runs, torchs = [], attention_module.varlen_runs, attention_module.varlen_attn

    def written_out(query, key, value, starts, ends, *longest, window_size):
        left, right = (side if side >= 0 else len(query) for side in window_size)
        return attention_written_out(query, key, value, pairs(starts, left, right))

    def recorded(*args, **kwargs):
        called.append(kwargs)
        return (torchs if args[0].is_cuda else written_out)(*args, **kwargs)

    def may_run(qkv, dropout):
        return runs(qkv, dropout) if qkv.is_cuda else qkv.dtype != torch.float32

    monkeypatch.setattr(attention_module, "varlen_attn", recorded)
    monkeypatch.setattr(attention_module, "varlen_runs", may_run)
    return called


@pytest.mark.parametrize(("device", "dtype", "tolerance"), ON_EVERY_DEVICE)
@pytest.mark.parametrize(("is_causal", "window"), REACHES)
def test_packed_attention_reaches_as_far_in_every_precision(
    is_causal, window, device, dtype, tolerance, torchs_packed_attention
):
    config = HybridConfig(**SIZES, pattern="T", attn_implementation="sdpa")
    layout = SequenceLayout.build(1, 90, device, packed=True, cu_seq_lens=CU)
    torch.manual_seed(0)
    qkv, weights = torch.randn(90, 3, 3, 8).to(device, dtype).requires_grad_(), torch.randn(90, 3, 8).double()
    exact = qkv.detach().cpu().double().requires_grad_()
    seen = pairs(CU, 90 if window is None else window - 1, 0 if is_causal else 90)
    expected = attention_written_out(*exact.unbind(1), seen)
    actual = Attention(config, is_causal=is_causal, window=window)(qkv, layout).cpu().double()
    gradients = (torch.autograd.grad((y * weights).sum(), x)[0] for y, x in ((expected, exact), (actual, qkv)))
    assert len(torchs_packed_attention) == (dtype != torch.float32)
    assert (actual - expected).norm() < tolerance * expected.norm()
    expected, actual = (gradient.cpu().double() for gradient in gradients)
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), ON_EVERY_DEVICE)
@pytest.mark.parametrize(("is_causal", "window"), REACHES)
@pytest.mark.parametrize("name", ["merge-attention", "merge-attention-swapped"])
def test_merged_attention_reaches_as_far_in_every_precision(
    name, is_causal, window, device, dtype, tolerance, torchs_packed_attention
):
    config = HybridConfig(**SIZES, pattern="T", attn_implementation="sdpa")
    fusion = randomise(make_fusion(name, config, RMSNorm, is_causal=is_causal, window=window))
    layout = SequenceLayout.build(1, 90, device, packed=True, cu_seq_lens=CU)
    u, a, s = torch.randn(3, 90, 24)
    asking, asked = (s, a) if fusion.swapped else (a, s)
    with torch.no_grad():
        query = fusion.query_proj(fusion.query_norm(asking)).view(90, 3, 8)
        key, value = fusion.key_value_proj(fusion.key_norm(asked)).view(90, 2, 3, 8).unbind(1)
        seen = pairs(CU, 90 if window is None else window - 1, 0 if is_causal else 90)
        expected = fusion.out_proj(attention_written_out(query, key, value, seen).flatten(1))
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            actual = fusion.to(device)(*(x.to(device) for x in (u, a, s)), layout).cpu().float()
    assert len(torchs_packed_attention) == (dtype != torch.float32)
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("window", [None, 4])
def test_causal_attention_with_dropout_sees_no_later_token(window):
    config = HybridConfig(**SIZES, pattern="T", attn_implementation="sdpa", attention_probs_dropout_prob=1e-9)
    layer = Attention(config, is_causal=True, window=window)
    torch.manual_seed(0)
    qkv = torch.randn(24, 3, 3, 8)
    torch.testing.assert_close(layer.train()(qkv, rows(2, 12)), layer.eval()(qkv, rows(2, 12)))


def test_sees():
    index = torch.arange(4)
    assert sees(index[:, None], index, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("make", [TransMambaMixer, Mamba2Mixer, Mamba1Mixer, CausalSelfAttention])
def test_float64_stays_float64(make):
    """In double precision the mixers agree with themselves to double precision, cut into pieces or not."""
    if make is TransMambaMixer:
        mixer = transmamba_mixer(4).double()
    else:
        mixer = randomise(make(HybridConfig(**SIZES, pattern="T", state_size=4, mamba_head_size=8))).double()
    h, memory, parts = torch.randn(2, 9, 24, dtype=torch.float64), LayerMemory(), []
    whole = mixer(h.flatten(0, 1), rows(2, 9)).view(2, 9, 24)
    assert whole.dtype == torch.float64
    for start, end in ((0, 3), (3, 7), (7, 9)):
        past = torch.full((2,), start)
        layout = rows(2, end - start)
        layout = replace(layout, past_S=past if start else None, positions=layout.positions + start)
        parts.append(mixer(h[:, start:end].flatten(0, 1), layout, memory).view(2, -1, 24))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_memory_grows_to_the_places_it_is_written_to_and_keeps_the_rest():
    memory, mask = LayerMemory(), torch.tensor([[1, 1, 0], [0, 1, 1]])
    first = SequenceLayout.build(2, 3, "cpu", packed=True, attention_mask=mask)
    memory.write(first, keys=torch.tensor([1.0, 2, 3, 4]))
    second = SequenceLayout.build(2, 1, "cpu", packed=True, attention_mask=torch.tensor([[1], [0]]))
    memory.write(replace(second, past_S=torch.tensor([2, 2])), keys=torch.tensor([5.0]))
    assert memory.tensors["keys"].tolist() == [[1, 2, 5], [3, 4, 0]]
    memory.select(torch.tensor([1, 1, 0]))
    assert memory.tensors["keys"].tolist() == [[3, 4, 0], [3, 4, 0], [1, 2, 5]]
    assert memory.nbytes == 9 * 4


def test_what_attention_remembers_ends_at_the_transpoint():
    mixer, memory = transmamba_mixer(4), LayerMemory()
    for t in range(7):
        past = None if t == 0 else torch.full((2,), t)
        layout = replace(rows(2, 1), past_S=past, positions=torch.full((2,), t))
        mixer(torch.randn(2, 24), layout, memory)
        held = {"conv", "keys", "values", "steps", "positions"} if t < 4 else {"conv", "state"}
        assert set(memory.tensors) == held
        if t < 4:
            assert memory.tensors["keys"].shape[1] == t + 1


def test_causal_attention_turns_with_position():
    layer, h = randomise(CausalSelfAttention(HybridConfig(**SIZES, pattern="T"))), torch.randn(10, 24)
    y = layer(h, rows(1, 10))
    shuffled = torch.cat((h[:8].flip(0), h[8:]))
    assert (layer(shuffled, rows(1, 10))[9] - y[9]).abs().max() > 1e-3


def test_mamba_1_is_maberts_causal_forward_mixer():
    config = HybridConfig(**SIZES, pattern="M", ssm="mamba1", state_size=4)
    ours = randomise(Mamba1Mixer(config))
    theirs = MambaMixer(MaBertConfig(**SIZES, pattern="M", state_size=4, conv_mode="causal"), "forward").eval()
    (ssm,) = theirs.ssms
    with torch.no_grad():
        theirs.in_proj.weight.copy_(ours.in_proj.weight)
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        ssm.conv1d.weight.copy_(ours.conv.conv1d.weight)
        ssm.conv1d.bias.copy_(ours.conv.conv1d.bias)
        ssm.x_proj.weight.copy_(ours.x_proj.weight)
        ssm.dt_proj.weight.copy_(ours.dt_proj.weight)
        ssm.dt_proj.bias.copy_(ours.dt_proj.bias)
        ssm.A_log.copy_(ours.A_log)
        ssm.D.copy_(ours.D)
    x = torch.randn(19, 24)
    torch.testing.assert_close(ours(x, rows(1, 19)), theirs(x, rows(1, 19)), rtol=1e-5, atol=1e-5)
