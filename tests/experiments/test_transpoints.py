"""TransMamba's experiments: equal sizes, losses, times, and the count of operations."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_experiments import QUIET, SECONDS, suite
from torch.utils.flop_counter import FlopCounterMode

from mabert import HybridConfig, TransMambaConfig
from mabert.experiments import pretraining
from mabert.experiments.architectures import Vocabulary, encoder_parameters
from mabert.experiments.causal_architectures import (
    CAUSAL_REFERENCES,
    HYBRIDS,
    causal_architecture,
    transmamba_name,
)
from mabert.experiments.causal_timing import CausalTiming, measure
from mabert.experiments.cells import run_cells
from mabert.experiments.scales import SCALES
from mabert.experiments.transpoints import TransPoints, mixer_flops, models_of, size_of, timing_cells
from mabert.layers import attention
from mabert.layers.transmamba import TransMambaMixer
from mabert.models.init import init_module
from mabert.ops import SequenceLayout


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CAUSAL_REFERENCES | HYBRIDS)
def test_references_have_as_many_parameters_outside_the_embeddings(name, scale):
    chosen, vocabulary = SCALES[scale]().causal, Vocabulary(1000)
    ours = encoder_parameters(causal_architecture("TransMamba-V9", chosen, vocabulary))
    theirs = encoder_parameters(causal_architecture(name, chosen, vocabulary))
    assert theirs == pytest.approx(ours, rel=0.006)


def test_architectures_by_name():
    scale = SCALES["cpu"]().causal
    v4 = causal_architecture(transmamba_name("V4"), scale, Vocabulary(500, 0, 2, 3))
    assert isinstance(v4, TransMambaConfig)
    assert v4.layer_transpoints() == [384, 512, 640, 384, 512, 640, 384, 512]
    assert (v4.vocab_size, v4.bos_token_id, v4.eos_token_id) == (500, 2, 3)
    hybrid = causal_architecture("Hybrid", scale)
    assert isinstance(hybrid, HybridConfig)
    assert hybrid.pattern == "MMMTMMMT"
    assert causal_architecture("sequential", scale).pattern == "SSSS"
    assert causal_architecture("sequential-attention-first", scale).pattern == "AAAA"
    assert causal_architecture("parallel-gate", scale).pattern == "PPPP"
    assert causal_architecture("parallel-gate", scale).fusion == "gate"
    longer = causal_architecture("TransMamba-V9", scale, longest=8192)
    assert longer.layer_transpoints() == [0, 128, 256, 512, 1024, 2048, 4096, 8192]
    with pytest.raises(ValueError, match=r"no causal architecture 'RNN'\. There are Transformer, Mamba-2, sequential"):
        causal_architecture("RNN", scale)


@pytest.mark.parametrize("name", CAUSAL_REFERENCES | HYBRIDS)
def test_mamba_1_costs_no_other_parameters(name):
    scale = SCALES["cpu"]().causal
    ours = encoder_parameters(causal_architecture("TransMamba-V9", scale))
    made = causal_architecture(name, scale, ssm="mamba1", sliding_window=64)
    assert (made.ssm, made.sliding_window) == ("mamba1", 64)
    assert encoder_parameters(made) == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"ssm": "mamba3"}, "ssm='mamba3' is not one of 'mamba2', 'mamba1'"),
        ({"sliding_window": 0}, "sliding_window must be at least 1 token"),
    ],
)
def test_mixers_that_do_not_exist_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        causal_architecture("sequential", SCALES["tiny"]().causal, **choices)


class TestMixers:
    """The hybrids' mixers by the fields of the scale, in what is trained and in what is kept of it."""

    def cell(self, tmp_path, name, **choices):
        ours = suite(tmp_path, replace(SECONDS, causal=replace(SECONDS.causal, **choices)))
        return TransPoints(ours.pretraining.sources, ours.pretraining.work, QUIET).pretraining(name)

    def test_they_are_those_of_the_model_that_is_trained(self, tmp_path, monkeypatch):
        def recorded(*, model, **_):
            trained.append(model)
            raise KeyboardInterrupt

        trained = []
        monkeypatch.setattr(pretraining, "PretrainConfig", recorded)
        monkeypatch.setattr(pretraining.Sources, "vocabulary", lambda self: Vocabulary(1000))
        for choices in ({}, {"ssm": "mamba1"}, {"sliding_window": 9}):
            with pytest.raises(KeyboardInterrupt):
                self.cell(tmp_path, "sequential", **choices).run()
        assert [(of.ssm, of.sliding_window) for of in trained] == [("mamba2", None), ("mamba1", None), ("mamba2", 9)]

    def test_a_cell_names_them_where_they_are_others(self, tmp_path):
        before = self.cell(tmp_path, "sequential").config
        assert not before.keys() & {"ssm", "sliding_window"}, "or no result from before these fields would be valid"
        after = self.cell(tmp_path, "sequential", ssm="mamba1", sliding_window=9).config
        assert after == before | {"ssm": "mamba1", "sliding_window": 9}
        kept = self.cell(tmp_path, "TransMamba-V9", ssm="mamba1", sliding_window=9).config
        assert kept == self.cell(tmp_path, "TransMamba-V9").config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transpoints")
    ours = suite(folder)
    experiment = TransPoints(ours.pretraining.sources, ours.pretraining.work, QUIET)
    cells = [cell for cell in experiment.cells() if cell.name.startswith("causal/")]
    run_cells(cells, ours.finetuning.store, console=QUIET)
    return ours, cells, folder


def test_all_read_the_same_rows_by_the_same_recipe(trained):
    _, cells, folder = trained
    contents = [json.loads((folder / "results" / f"{cell.name}.json").read_text()) for cell in cells]
    assert [content["config"]["architecture"] for content in contents] == ["TransMamba-V9", *CAUSAL_REFERENCES]
    common = [{k: v for k, v in content["config"].items() if k != "architecture"} for content in contents]
    assert all(config == common[0] for config in common)
    assert common[0]["lr_schedule"] == "cosine"
    assert common[0]["stage_lengths"] == [128]
    results = [content["result"] for content in contents]
    assert {result["tokens"] for result in results} == {4 * 2 * 128}
    assert len({result["held_out"][0]["labels"] for result in results}) == 1
    assert len({result["held_out"][0]["loss"] for result in results}) == 4
    assert len({result["held_out"][0]["unigram_entropy"] for result in results}) == 1


def test_what_is_trained_is_not_trained_again(trained, monkeypatch):
    from mabert.experiments import pretraining

    ours, cells, _ = trained
    monkeypatch.setattr(pretraining, "pretrain", lambda *a, **k: pytest.fail("repeated"))
    run_cells(cells, ours.finetuning.store, console=QUIET)


def test_every_length_model_and_transpoint_is_timed():
    names = [cell.name for cell in timing_cells(SECONDS)]
    assert len(names) == len(set(names))
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    for length in (64, 128):
        assert {f"causal-step/{precision}/{model}/{length}" for model in models_of(SECONDS.causal)} <= set(names)
        points = (0, length // 2, length)
        assert {f"causal-layer/{precision}/{length}/{point}" for point in points} <= set(names)
    assert models_of(SCALES["cpu"]().causal)[4:] == [f"TransMamba-V{n}" for n in range(1, 9)]
    assert all(cell.alone for cell in timing_cells(SECONDS))


def timing(**changes):
    size = size_of(SCALES["tiny"]().causal)
    choices = {"architecture": "TransMamba-V9", "size": size, "length": 64, "bf16": False, "device": "cpu"}
    return CausalTiming(**choices | {"repetitions": 2, "seconds": 30.0} | changes)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_is_timed(bf16):
    result = measure(timing(bf16=bf16))
    assert len(result["samples_ms"]) == 2
    assert result["median_ms"] > 0
    assert result["parameters"] > 0


def test_a_layer_is_timed_at_its_transpoint(monkeypatch):
    points = []
    original = SequenceLayout.split
    monkeypatch.setattr(SequenceLayout, "split", lambda layout, point: points.append(point) or original(layout, point))
    for point in (0, 20, 64):
        assert measure(timing(point=point, repetitions=1))["median_ms"] > 0
    assert sorted(set(points)) == [0, 20, 64]


@pytest.mark.parametrize("point", [64, None])
def test_what_is_timed_writes_out_no_scores(monkeypatch, point):
    def refuse(*_, **__):
        raise AssertionError("the slow attention")

    monkeypatch.setattr(attention, "eager_attention", refuse)
    assert measure(timing(point=point, repetitions=1))["median_ms"] > 0


def test_a_slower_model_shows_a_larger_time():
    quick, slow = (measure(timing(architecture="Transformer", length=n, repetitions=3)) for n in (16, 512))
    assert slow["median_ms"] > 1.5 * quick["median_ms"]


CONFIG = TransMambaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=64, num_hidden_layers=1)


@pytest.mark.parametrize("point", [0, 64, 128, 256])
def test_operations_are_those_that_torch_counts(point):
    """Where all chunks are full; torch counts scores that are masked as well."""
    CONFIG.transpoints = [point]
    mixer = TransMambaMixer(CONFIG, 0)
    for module in mixer.modules():
        init_module(module, CONFIG)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.randn(256, 64), SequenceLayout.build(1, 256, "cpu", packed=True))
    parts = mixer_flops(CONFIG, 256, point)
    masked = 2 * point * (point - 1) * 64
    assert counter.get_total_flops() == sum(parts.values()) + masked


def test_operations_grow_with_the_square_of_the_transpoint_and_are_fewest_in_between():
    totals = {point: sum(mixer_flops(CONFIG, 8192, point).values()) for point in range(0, 8193, 512)}
    fewest = min(totals, key=lambda point: totals[point])
    assert totals[8192] > totals[0] * 4
    assert 0 <= fewest < 1024
    second = [totals[p + 512] - 2 * totals[p] + totals[p - 512] for p in range(512, 7680, 512)]
    assert all(difference == pytest.approx(4 * 512**2 * 64) for difference in second[1:])
