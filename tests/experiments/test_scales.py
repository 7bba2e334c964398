"""Scales: what they refuse."""

from dataclasses import replace

import pytest

from mabert.experiments.scales import SCALES, tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretraining_seeds": 0}, "pretraining_seeds=0 must be at least 1"),
        ({"finetuning_seeds": 0}, "finetuning_seeds=0 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"tasks": ()}, "tasks is empty: give at least one"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"tasks": ("Foo",)}, "unknown GLUE task 'Foo'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction=1.0 must be at least 0 and below 1"),
        ({"budgets": (0.5, 2.0)}, "budget=2.0 must be above 0 and at most 1"),
        ({"pattern_budget": 0.0}, "budget=0.0 must be above 0"),
        ({"stage_lengths": (64,)}, r"stage_fractions=.* must give each of stage_lengths=\(64,\) its share"),
        ({"eval_rows": 0}, "eval_rows=0 must be at least 1"),
        ({"micro_batch_size": 5}, "micro_batch_size=5"),
        ({"hidden_size": 63}, "hidden_size.*63"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rate=0.0 must be above 0"),
        ({"batch_sizes": (0,)}, "batch_size=0 must be at least 1"),
        ({"epochs": (0,)}, "epochs=0 must be at least 1"),
        ({"max_train_rows": 0}, "max_train_rows=0 must be at least 1"),
        ({"max_length": 3}, "max_length=3 must be at least 4"),
        ({"patterns": ("MMT",)}, "patterns: 'MMT' must be 12 letters of M, T, P"),
        ({"patterns": ("MMXMMXMMXMMX",)}, "patterns: 'MMXMMXMMXMMX' must be 12 letters"),
        ({"cell_seconds": -1.0}, "cell_seconds=-1.0 must be above 0"),
        ({"drift_rows": -3}, "drift_rows=-3 must be at least 1"),
        ({"efficiency_lengths": (0, 128)}, r"efficiency_lengths=\(0, 128\) must be at least 1 each"),
        ({"efficiency_scale": "huge"}, "efficiency_scale='huge' is not one of tiny, cpu, mini, small, base"),
        ({"causal": {"steps": 0}}, "causal.steps=0 must be at least 1"),
        ({"causal": {"layers": 0}}, "causal.layers=0 must be at least 1"),
        ({"causal": {"hidden_size": 0}}, "causal.hidden_size=0 must be at least 1"),
        ({"causal": {"num_attention_heads": 0}}, "causal.num_attention_heads=0 must be at least 1"),
        ({"causal": {"intermediate_size": 0}}, "causal.intermediate_size=0 must be at least 1"),
        ({"causal": {"micro_batch_size": 0}}, "causal.micro_batch_size=0 must be at least 1"),
        ({"causal": {"length": 3}}, "causal.length=3 must be at least 4"),
        (
            {"causal": {"length": 8}},
            "asks for 2 facts in a quarter of causal.length=8, in 72 words: .* at least 11 tokens",
        ),
        ({"causal": {"num_attention_heads": 3}}, "causal.hidden_size=32 must be an even number for each of .*heads=3"),
        ({"causal": {"eval_rows": 0}}, "causal.eval_rows=0 must be at least 1"),
        ({"causal": {"learning_rate": -1.0}}, "causal.learning_rate=-1.0 must be above 0"),
        ({"causal": {"schedules": ()}}, "causal.schedules is empty: give at least one"),
        ({"causal": {"timed_lengths": ()}}, "causal.timed_lengths is empty: give at least one"),
        ({"causal": {"timed_lengths": (0, 64)}}, r"causal.timed_lengths=\(0, 64\) must be at least 1 each"),
        ({"causal": {"ssm": "mamba3"}}, "causal.ssm='mamba3' is not one of mamba2, mamba1"),
        ({"causal": {"sliding_window": 0}}, "causal.sliding_window=0 must be at least 1"),
        ({"causal": {"layers": 6}}, "causal.layers=6 must be a multiple of 4"),
        ({"causal": {"schedules": ("V9", "V11")}}, "there is no schedule 'V11'. There are V1, V2"),
        ({"causal": {"timed": "huge"}}, "causal.timed='huge' is not one of tiny"),
        ({"causal": {"timed_points": 1}}, "causal.timed_points=1 must be at least 2"),
    ],
)
def test_bad_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(
            tiny(),
            **{name: replace(tiny().causal, **new) if name == "causal" else new for name, new in changes.items()},
        )


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_goes_by_its_name(name):
    assert SCALES[name]().name == name


def test_tasks_go_by_their_names_in_any_case():
    assert replace(tiny(), tasks=("mrpc", "cola")).tasks == ("MRPC", "CoLA")


def test_initial_values_grow_as_the_width_shrinks():
    assert SCALES["base"]().initializer_range == pytest.approx(0.02)
    assert replace(tiny(), hidden_size=192).initializer_range == pytest.approx(0.04)
