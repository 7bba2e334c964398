"""The recall experiment: its cells, what they keep, and the hybrids as language models."""

import json
from dataclasses import replace

import pytest
from tiny_experiments import QUIET, SECONDS, suite

from mabert.data.recall import KINDS, PLACES
from mabert.experiments import recall
from mabert.experiments.architectures import encoder_parameters
from mabert.experiments.catalogue import cells_of
from mabert.experiments.causal_architectures import HYBRIDS
from mabert.experiments.cells import CellStore, run_cells
from mabert.experiments.recall import Recall
from mabert.experiments.scales import SCALES, RecallScale
from mabert.models.causal import MEMORIES
from mabert.training.recall import RecallRun, RecallTraining

SCALE = replace(
    SECONDS,
    recall=replace(SECONDS.recall, kinds=tuple(KINDS), lengths=(32, 48), pairs=(3, 8), steps=3, seeds=2, eval_rows=8),
)


def test_every_architecture_kind_and_seed_is_a_cell():
    names = [cell.name for cell in Recall(SCALE, QUIET).cells()]
    assert len(names) == len(set(names)) == len(HYBRIDS) * 3 * 2
    assert "recall/parallel-merge-attention/phonebook/1" in names
    tasks = {kind: [(task.pairs, task.length) for task in SCALE.recall.tasks(kind)] for kind in SCALE.recall.kinds}
    assert tasks == {
        "mqar": [(3, 32), (3, 48), (8, 48)],  # eight find no room in 32 tokens
        "phonebook": [(3, 32), (3, 48)],
        "passkey": [(1, 32), (1, 48)],
    }


def test_a_cell_keeps_what_was_recalled_by_place_and_memory(tmp_path):
    store = CellStore(tmp_path / "results", tmp_path / "work")
    cell = Recall(SCALE, QUIET).cell("sequential", "mqar", 1)
    run_cells([cell], store, console=QUIET)
    content = json.loads(store.path(cell).read_text())
    assert content["config"]["tasks"][0] == {
        "kind": "mqar",
        "length": 32,
        "pairs": 3,
        "place": "spread",
        "vocab_size": 128,
    }
    assert content["config"]["run"]["seed"] == 1
    result = content["result"]
    assert [(asked["pairs"], asked["length"]) for asked in result["asked"]] == [(3, 32), (3, 48), (8, 48)]
    for asked in result["asked"]:
        assert asked["accuracy"].keys() == set(PLACES)
        assert asked["probes"].keys() == MEMORIES.keys()
        assert asked["probes"]["both"] == asked["accuracy"]["spread"]
    assert [(lesson["pairs"], lesson["steps"]) for lesson in result["lessons"]] == [(0, 2), (2, 2)]
    assert len(result["losses"]) == 3


def test_hybrids_share_the_references_of_transmamba(tmp_path):
    ours = suite(tmp_path)
    names = {cell.name for cell in cells_of(["hybrids"], ours)}
    assert {f"causal/{name}/0" for name in HYBRIDS} <= names
    both = cells_of(["hybrids", "transpoints"], ours)
    assert sum(cell.name == "causal/Transformer/0" for cell in both) == 1


def test_every_choice_of_training_reaches_the_run():
    choices = {
        "copied": 20,
        "lessons": (2, 3),
        "lesson_steps": 7,
        "steps": 5,
        "tokens": 99,
        "learning_rate": 0.5,
    }
    assert RecallScale(**choices).run(3) == RecallRun(**choices, seed=3)
    changed = replace(SCALE, recall=replace(SCALE.recall, **choices))
    run = Recall(changed, QUIET).cell("sequential", "mqar", 3).config["run"]
    assert {name: run[name] for name in choices} == choices
    assert run["seed"] == 3


def test_a_scale_says_how_much_a_state_holds(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(recall, "train_recall", lambda model, *_: trained.append(model) or RecallTraining([], []))
    for state_size in (None, 3):
        scale = replace(SCALE, recall=replace(SCALE.recall, state_size=state_size))
        cell = Recall(scale, QUIET).cell("Mamba-2", "passkey", 0)
        assert cell.config["size"]["state_size"] == state_size
        run_cells([cell], CellStore(tmp_path / str(state_size), tmp_path / "work"), console=QUIET)
    default, given = (model.config for model in trained)
    assert default.state_size == default.hidden_size // default.num_attention_heads
    assert given.state_size == 3
    assert encoder_parameters(given) == pytest.approx(encoder_parameters(default), rel=0.02)


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_can_ask_what_it_plans(scale):
    recall = SCALES[scale]().recall
    for kind in recall.kinds:
        assert {task.length for task in recall.tasks(kind)} == set(recall.lengths)
        assert max(recall.lessons) <= max(recall.pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 5}, "recall.layers=5 must be even and at least 4"),
        ({"layers": 2}, "recall.layers=2 must be even and at least 4"),
        ({"steps": 0}, "recall.steps=0 must be at least 1"),
        (
            {"lengths": (64, 16)},
            "recall: rows of 16 tokens have no room for mqar with any of pairs=.4, 16.: give fewer",
        ),
        ({"kinds": ("mqar", "needle")}, "there is no recall task 'needle'"),
        ({"lessons": (2, 30), "vocab_size": 100}, "mqar with 30 pairs takes a vocabulary of at least 134"),
        ({"copied": 7}, "length=7 must be at least 8"),
        ({"tokens": 0}, "recall.tokens=0 must be at least 1"),
        ({"state_size": 0}, "recall.state_size=0 must be at least 1"),
    ],
)
def test_scales_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecallScale(**changes)
