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
        ({"efficiency_scale": "huge"}, "efficiency_scale='huge' is not one of tiny, cpu, mini, small, base"),
    ],
)
def test_bad_choices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny(), **changes)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_goes_by_its_name(name):
    assert SCALES[name]().name == name


def test_initial_values_grow_as_the_width_shrinks():
    assert SCALES["base"]().initializer_range == pytest.approx(0.02)
    assert replace(tiny(), hidden_size=192).initializer_range == pytest.approx(0.04)
