"""What a timing process measures: time, memory, the way a model attends, and how it is given its sequences."""

import json
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mabert.data.mlm import IGNORED
from mabert.experiments import packed_attention, timing
from mabert.experiments.efficiency import MODELS, size_of
from mabert.experiments.packed_attention import PACKED_ATTENTION
from mabert.experiments.scales import tiny
from mabert.experiments.timing import (
    BLOCK_SPARSE_ABOVE,
    Timing,
    build,
    checked_big_bird_attention,
    lengths,
    make_batch,
    measure,
    measure_as_it_is,
    repeat,
    training_step,
)
from mabert.training.objectives import labelled_logits

SIZE = size_of(tiny())


def timed(architecture="MaBERT", length=32, *, training=False, **choices):
    choices = {"size": SIZE, "bf16": False, "device": "cpu", "repetitions": 1, "seconds": 60.0} | choices
    return Timing(architecture=architecture, length=length, training=training, **choices)


@pytest.fixture
def packed_on_a_cpu(monkeypatch):
    """torch's variable-length attention needs a GPU: the same by its description, sequence after sequence."""

    def attend(query, key, value, ends, key_ends, longest, longest_key, *, window_size=(-1, -1)):
        assert torch.equal(ends, key_ends)
        assert longest == longest_key == ends.diff().max()
        outputs = []
        for q, k, v in zip(*(x.split(ends.diff().tolist()) for x in (query, key, value)), strict=True):
            places = torch.arange(len(q))
            distance = places[None, :] - places[:, None]
            left, right = (reach if reach >= 0 else len(q) for reach in window_size)
            seen = (distance >= -left) & (distance <= right)
            heads = (x.transpose(0, 1) for x in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(packed_attention, "varlen_attn", attend)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_every_model_is_measured(architecture, training):
    result = measure(timed(architecture, training=training, bf16=True, repetitions=2))
    assert len(result["samples_ms"]) == result["repetitions"] == 2
    assert min(result["samples_ms"]) <= result["median_ms"] <= max(result["samples_ms"])
    assert result["attention"] == ("eager" if architecture in ("Longformer", "BigBird", "DeBERTa") else "sdpa")
    assert 0 <= result["extra_resident_bytes"] < result["peak_resident_bytes"]
    assert result["tokens"] == 32
    assert result["threads"] == torch.get_num_threads()
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("training", [False, True])
def test_a_larger_model_and_a_longer_text_take_longer(training):
    def fastest(length, **changes):
        return min(measure(timed("BERT", length, training=training, repetitions=3, **changes))["samples_ms"])

    wide = SIZE | {"hidden_size": 256, "intermediate_size": 1024, "match_parameters": False}
    small = fastest(32)
    assert fastest(32, size=wide) > 1.5 * small
    assert fastest(512) > 1.5 * small


def test_memory_is_the_peak_and_what_was_there_before():
    planted = 2**28
    with timing.memory("cpu") as used:
        torch.ones(planted // 4)
    assert 0.9 * planted < used["extra_resident_bytes"] < 1.5 * planted
    assert used["peak_resident_bytes"] > 1.3 * used["extra_resident_bytes"]


@pytest.mark.parametrize("bf16", [False, True])
def test_big_bird_is_sparse_above_704_tokens_only(bf16):
    run = partial(timed, "BigBird", bf16=bf16)
    assert measure(run(length=BLOCK_SPARSE_ABOVE))["big_bird_attention"] == "original_full"
    # the next that needs no more positions than it has tokens: it fills its last block of 64
    assert measure(run(length=768))["big_bird_attention"] == "block_sparse"


def test_big_bird_that_met_a_short_text_is_not_taken_for_a_sparse_one():
    model = build(timed("BigBird", 768))
    model(torch.full((1, 64), 7))
    with pytest.raises(RuntimeError, match="'original_full' at 768 tokens, where 'block_sparse'"):
        checked_big_bird_attention(model, 768)


def test_big_bird_in_one_dtype_says_the_same():
    outputs = []
    for bf16 in (False, True):
        settings = timed("BigBird", 768, bf16=bf16)
        torch.manual_seed(0)
        model = build(settings)
        batch = make_batch(model.config, settings, [768])
        with torch.no_grad(), timing.arithmetic(settings):
            outputs.append(model(**batch.inputs).last_hidden_state.float())
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 1e-5 < difference < 0.05


def test_big_bird_meets_no_short_micro_batch_in_a_mixture():
    settings = timed("BigBird", 768, rows=4, mixed_lengths=True)
    widths = [make_batch(build(settings).config, settings, [n]).inputs["input_ids"].shape[1] for n in lengths(settings)]
    assert widths == [705, 705, 705, 768]


def test_the_papers_protocol_pads_and_the_best_drops_nothing_in_attention():
    padded = build(timed(execution="padded", training=True))
    assert (padded.config.execution, padded.config.psm) == ("padded", "pre+post")
    assert padded.config.attention_probs_dropout_prob == 0.1
    assert padded.training
    assert build(timed()).config.execution == "packed"
    for architecture in ("MaBERT", "BERT", "ModernBERT"):
        config = build(timed(architecture, attention_dropout=False)).config
        assert getattr(config, "attention_probs_dropout_prob", 0.0) == getattr(config, "attention_dropout", 0.0) == 0.0
    assert build(timed("BERT", attention_dropout=False)).config.hidden_dropout_prob == 0.1


def test_a_model_is_as_long_as_the_text():
    assert build(timed("MaBERT", 48)).config.max_position_embeddings == 48
    assert build(timed("Longformer", 48)).config.max_position_embeddings == 50  # positions begin behind the pad's id


def test_attention_may_use_the_named_kernels_only():
    with timing.arithmetic(timed(sdpa_kernels=["MATH"])):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_labels_are_at_every_seventh_real_token():
    settings = timed("BERT", 16, rows=2, mixed_lengths=False)
    batch = make_batch(build(settings).config, settings, [16, 3])
    places = (batch.labels != IGNORED).nonzero().tolist()
    assert places == [[0, 0], [0, 7], [0, 14], [1, 0]]
    assert torch.equal(batch.targets, batch.inputs["input_ids"][batch.labels != IGNORED])
    assert batch.inputs["attention_mask"].sum(1).tolist() == [16, 3]


def test_mixed_lengths_are_even_shares():
    assert lengths(timed(length=40, rows=4, mixed_lengths=True)) == [10, 20, 30, 40]
    assert lengths(timed(length=40, rows=4)) == [40] * 4


@pytest.mark.parametrize("architecture", ["BERT", "ALBERT", "ModernBERT"])
def test_packed_sequences_are_those_of_a_padded_batch(architecture, packed_on_a_cpu):
    rows = [90, 7, 200]  # longer than ModernBERT's window
    padded = timed(architecture, 200, training=True, rows=3)
    packed = replace(padded, mixed_lengths=True)
    logits = []
    for settings in (padded, packed):
        torch.manual_seed(0)
        model = build(settings).eval()
        batch = make_batch(model.config, settings, rows)
        logits.append(labelled_logits(model, batch.inputs, batch.labels))
        model.zero_grad()
    assert model.config._attn_implementation == PACKED_ATTENTION
    assert batch.inputs["input_ids"].shape == (1, sum(rows))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["MaBERT", "BERT"])
def test_a_step_by_micro_batches_is_the_same_step(architecture, monkeypatch):
    monkeypatch.setattr(timing, "adamw", lambda model, learning_rate: torch.optim.SGD(model.parameters(), lr=1.0))
    settings = timed(architecture, 21, training=True, rows=4, mixed_lengths=architecture == "MaBERT")
    moved = []
    for micro_batch in (4, 2):
        torch.manual_seed(0)
        model = build(settings).eval()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        monkeypatch.setattr(torch, "randint", lambda low, high, shape: torch.arange(shape[1]).expand(shape) + low)
        training_step(model, settings, micro_batch)()
        moved.append([new - old for new, old in zip(model.parameters(), before, strict=True)])
    assert sum(change.abs().sum() for change in moved[0]) > 0
    for whole, parts in zip(*moved, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def limited(fits, model, settings, micro_batch):
        tried.append(micro_batch)
        if micro_batch > fits:
            raise torch.OutOfMemoryError
        return {"micro_batch": micro_batch}

    settings = timed(training=True, rows=32)
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(timing, "measure_rows", partial(limited, 8))
    assert measure_as_it_is(model, settings) == {"micro_batch": 8}
    assert tried == [32, 16, 8]
    monkeypatch.setattr(timing, "measure_rows", partial(limited, 0))
    with pytest.raises(torch.OutOfMemoryError):
        measure_as_it_is(model, settings)
    assert tried[-1] == 1
    with pytest.raises(torch.OutOfMemoryError):  # latency is that of the whole batch
        measure_as_it_is(model, replace(settings, training=False))
    assert tried[-1] == 32


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_faster_of_compiled_and_not_counts(training, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    result = measure(timed("BERT", training=training, compiled=True, repetitions=3))
    (other,) = result["other_ways"].values()
    assert {result["way"], *result["other_ways"]} == {"plain", "compiled"}
    assert result["median_ms"] <= other["median_ms"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch._dynamo.exc.Unsupported, "does_not_compile"),
        (torch.OutOfMemoryError, "out_of_memory"),
        (RuntimeError, "does_not_compile"),
    ],
)
def test_what_does_not_compile_is_said_and_the_plain_time_kept(monkeypatch, error, why):
    def refuse(model):
        def fail(*arguments, **keywords):
            raise error("planted")

        monkeypatch.setattr(model, "forward", fail)

    monkeypatch.setattr(timing, "compile_in_place", refuse)
    result = measure(timed("BERT", compiled=True))
    assert result["way"] == "plain"
    assert result["median_ms"] > 0
    assert "planted" in result["other_ways"]["compiled"][why]


class Clock:
    """Runs that take what is planted, in milliseconds."""

    def __init__(self, monkeypatch, *planted):
        self.planted = list(planted)
        monkeypatch.setattr(timing, "milliseconds", lambda run, device: self.planted.pop(0))

    def repeat(self, **choices):
        return repeat(lambda: None, self.planted.pop(0), timed(**choices))


def test_warm_up_does_not_count(monkeypatch):
    clock = Clock(monkeypatch, 900.0, 800.0, 10.0, 30.0, 20.0)
    result = clock.repeat(warm_up=2, repetitions=3, seconds=60.0)
    assert result["samples_ms"] == [10.0, 30.0, 20.0]
    assert (result["median_ms"], result["warm_up"], result["warm_up_counted"]) == (20.0, 2, False)


def test_no_repetition_begins_that_would_end_too_late(monkeypatch):
    clock = Clock(monkeypatch, 40_000.0, 30_000.0, 35_000.0, 1.0)
    result = clock.repeat(repetitions=5, seconds=120.0)
    assert result["samples_ms"] == [30_000.0, 35_000.0]
    assert clock.planted == [1.0]


def test_a_single_slow_run_is_the_sample(monkeypatch):
    result = Clock(monkeypatch, 83_000.0).repeat(repetitions=5, seconds=120.0)
    assert (result["samples_ms"], result["warm_up_counted"]) == ([83_000.0], True)


def test_warming_up_has_its_share_of_the_time_only(monkeypatch):
    clock = Clock(monkeypatch, *[16_000.0] * 20)
    result = clock.repeat(warm_up=20, repetitions=100, seconds=120.0, device="cuda")
    # 20 s of 120 warm up: two runs after the first, which compiled; six more begin before 120 s are over
    assert (result["warm_up"], result["repetitions"]) == (3, 5)


def answer(settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timing", json.dumps(asdict(settings))])
    timing.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_want_of_memory_is_an_answer(monkeypatch, capsys):
    def planted(settings):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(timing, "measure", planted)
    assert answer(timed(), monkeypatch, capsys) == {"out_of_memory": True}
    monkeypatch.setattr(timing, "measure", lambda settings: {"floats": torch.empty(2**55).numel()})
    assert answer(timed(), monkeypatch, capsys) == {"out_of_memory": True}


def test_another_mistake_is_not(monkeypatch, capsys):
    def planted(settings):
        raise RuntimeError("planted")

    monkeypatch.setattr(timing, "measure", planted)
    with pytest.raises(RuntimeError, match="planted"):
        answer(timed(), monkeypatch, capsys)
