"""The recall experiment: its cells, what they keep, and the hybrids as language models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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
from mabert.training import recall as training
from mabert.training.recall import RecallRun, RecallScore, RecallTraining

SCALE = replace(
    SECONDS,
    recall=replace(SECONDS.recall, kinds=tuple(KINDS), lengths=(32, 48), pairs=(3, 8), seeds=2, eval_rows=8),
)


def experiment(scale=SCALE, work=Path("work")):
    return Recall(scale, QUIET, work)


def test_every_architecture_kind_and_seed_is_a_cell():
    names = [cell.name for cell in experiment().cells()]
    assert len(names) == len(set(names)) == len(HYBRIDS) * 3 * 2
    assert "recall/parallel-merge-attention/phonebook/1" in names
    tasks = {kind: [(task.pairs, task.length) for task in SCALE.recall.tasks(kind)] for kind in SCALE.recall.kinds}
    assert tasks == {
        "mqar": [(3, 32), (3, 48), (8, 48)],  # eight find no room in 32 tokens
        "phonebook": [(3, 32), (3, 48)],
        "passkey": [(1, 32), (1, 48)],
    }
    assert [(task.pairs, task.length) for task in SCALE.recall.asked("phonebook")] == [
        (3, 32),
        (3, 48),
        (3, 64),
        (8, 64),
    ]


def test_a_cell_keeps_what_was_recalled_by_place_and_memory(tmp_path):
    store = CellStore(tmp_path / "results", tmp_path / "work")
    cell = experiment(work=tmp_path / "work").cell("sequential", "mqar", 1)
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
    assert content["config"]["beyond"] == [64]
    asked = [(asked["pairs"], asked["length"]) for asked in result["asked"]]
    assert asked == [(3, 32), (3, 48), (3, 64), (8, 48), (8, 64)]
    for asked in result["asked"]:
        assert asked["accuracy"].keys() == set(PLACES)
        assert asked["probes"].keys() == MEMORIES.keys()
        assert asked["probes"]["both"] == asked["accuracy"]["spread"]
        assert asked["guessing"] == pytest.approx({3: 0.63, 8: 0.4}[asked["pairs"]], abs=0.04)
    given = [(lesson["pairs"], lesson["steps"], lesson["learnt_after"]) for lesson in result["lessons"]]
    assert given == [(0, 2, None), (2, 2, None)]
    assert result["taught"] == 4
    assert len(result["losses"]) == 4
    assert not (tmp_path / "work" / "recall" / "sequential" / "mqar" / "1").exists(), "nobody needs it again"


def test_each_place_and_memory_is_asked(tmp_path, monkeypatch):
    asked = []

    def recorded(model, task, rows, *, memories, batch_size):
        assert rows == SCALE.recall.eval_rows
        assert batch_size == 2**14 // task.length
        asked.append((task.pairs, task.length, task.place, memories))
        return RecallScore(len(asked), 0.0)

    monkeypatch.setattr(recall, "evaluate_recall", recorded)
    monkeypatch.setattr(recall, "train_recall", lambda model, *_, **__: RecallTraining())
    store = CellStore(tmp_path / "results", tmp_path / "work")
    cell = experiment(work=tmp_path / "work").cell("sequential", "passkey", 0)
    run_cells([cell], store, console=QUIET)
    expected = [
        (1, length, *how)
        for length in (32, 48, 64)
        for how in [
            *((place, "both") for place in PLACES),
            *(("spread", memories) for memories in MEMORIES if memories != "both"),
        ]
    ]
    assert asked == expected
    first, *_ = store.read(cell)["asked"]
    assert first["accuracy"] == {"early": 1, "middle": 2, "late": 3, "spread": 4}
    assert first["probes"] == {"both": 4, "recurrent-only": 5, "attention-only": 6, "none": 7}


def test_a_stopped_cell_goes_on_with_the_same_result(tmp_path, monkeypatch):
    def result(folder):
        store = CellStore(folder / "results", folder / "work")
        cell = experiment(work=folder / "work").cell("parallel-gate", "mqar", 0)
        run_cells([cell], store, console=QUIET)
        return store.read(cell)

    whole = result(tmp_path / "whole")
    steps = []

    def step(self, *args, **kwargs):
        steps.append(self.training.steps)
        if steps == list(range(7)):
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    original = training._Pupil.step
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)
    monkeypatch.setattr(training._Pupil, "step", step)
    with pytest.raises(KeyboardInterrupt):
        result(tmp_path / "stopped")
    assert result(tmp_path / "stopped") == whole
    assert steps == [*range(7), 6, 7]


def test_hybrids_share_the_references_of_transmamba(tmp_path):
    ours = suite(tmp_path)
    names = {cell.name for cell in cells_of(["hybrids"], ours)}
    assert {f"causal/{name}/0" for name in HYBRIDS} <= names
    both = cells_of(["hybrids", "transpoints"], ours)
    assert sum(cell.name == "causal/Transformer/0" for cell in both) == 1


def test_every_choice_of_training_reaches_the_run():
    choices = {
        "lessons": (2, 0, 3),
        "lesson_steps": (7, 9, 8),
        "lesson_tokens": 88,
        "copied": 20,
        "steps": 5,
        "tokens": 99,
        "learning_rate": 0.5,
    }
    assert RecallScale(**choices).run(3) == RecallRun(**choices, seed=3)
    changed = replace(SCALE, recall=replace(SCALE.recall, **choices))
    run = experiment(changed).cell("sequential", "mqar", 3).config["run"]
    assert {name: run[name] for name in choices} == choices
    assert run["seed"] == 3


@pytest.mark.parametrize(("bf16", "gpu"), [(True, True), (True, False), (False, True)])
def test_bf16_takes_the_scale_and_a_gpu(monkeypatch, bf16, gpu):
    monkeypatch.setattr(recall.torch.cuda, "is_available", lambda: gpu)
    cell = experiment(replace(SCALE, bf16=bf16)).cell("sequential", "mqar", 0)
    assert cell.config["run"]["bf16"] is (bf16 and gpu)


def test_every_seed_begins_with_weights_of_its_own(tmp_path, monkeypatch):
    begun = []

    def train(model, *_, **__):
        begun.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        return RecallTraining()

    monkeypatch.setattr(recall, "train_recall", train)
    monkeypatch.setattr(recall, "evaluate_recall", lambda *_, **__: RecallScore(0.0, 0.0))
    for index, seed in enumerate((0, 1, 0)):
        cell = experiment(work=tmp_path / "work").cell("sequential", "passkey", seed)
        run_cells([cell], CellStore(tmp_path / str(index), tmp_path / "work"), console=QUIET)
    zero, one, again = begun
    assert torch.equal(zero, again)
    assert (zero != one).float().mean() > 0.5


def trained_config(tmp_path, monkeypatch, name, **choices):
    """The config of the model that a cell trains with these choices of the scale."""
    trained = []
    monkeypatch.setattr(recall, "train_recall", lambda model, *_, **__: trained.append(model) or RecallTraining())
    scale = replace(SCALE, recall=replace(SCALE.recall, **choices))
    cell = experiment(scale, tmp_path / "work").cell(name, "passkey", 0)
    assert {key: cell.config["size"][key] for key in choices} == choices
    run_cells([cell], CellStore(tmp_path / str(choices), tmp_path / "work"), console=QUIET)
    return trained[0].config


def test_a_scale_says_how_much_a_state_holds(tmp_path, monkeypatch):
    default = trained_config(tmp_path, monkeypatch, "Mamba-2")
    given = trained_config(tmp_path, monkeypatch, "Mamba-2", state_size=3)
    assert default.state_size == default.hidden_size // default.num_attention_heads
    assert given.state_size == 3
    assert encoder_parameters(given) == pytest.approx(encoder_parameters(default), rel=0.02)


def test_a_scale_says_which_ssm_and_how_far_attention_reaches(tmp_path, monkeypatch):
    default = trained_config(tmp_path, monkeypatch, "sequential")
    assert (default.ssm, default.sliding_window) == ("mamba2", None)
    given = trained_config(tmp_path, monkeypatch, "sequential", ssm="mamba1", sliding_window=7)
    assert (given.ssm, given.sliding_window) == ("mamba1", 7)


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
        (
            {"lessons": (2, 30), "lesson_steps": (1, 1), "vocab_size": 100},
            "mqar with 30 pairs takes a vocabulary of at least 134",
        ),
        (
            {"kinds": ("mqar",), "pairs": (4, 200), "vocab_size": 2048},
            "recall: 200 facts find no room in any row",
        ),
        ({"copied": 7}, "length=7 must be at least 8"),
        ({"tokens": 0}, "recall.tokens=0 must be at least 1"),
        ({"lesson_tokens": 0}, "lesson_tokens=0 must be at least 1"),
        ({"lessons": (2,)}, "lesson_steps=.* must be a number above 0 for each of lessons="),
        ({"state_size": 0}, "recall.state_size=0 must be at least 1"),
        ({"ssm": "mamba3"}, "recall.ssm='mamba3' is not one of mamba2, mamba1"),
        ({"sliding_window": 0}, "recall.sliding_window=0 must be at least 1"),
        ({"kinds": ()}, "recall.kinds is empty: give at least one"),
        ({"lengths": ()}, "recall.lengths is empty: give at least one"),
        ({"pairs": ()}, "recall.pairs is empty: give at least one"),
        ({"beyond": (512,)}, "recall.beyond=.512,. must be longer than the rows of training, lengths=.64, 128"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 must be above 0"),
    ],
)
def test_scales_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecallScale(**changes)
