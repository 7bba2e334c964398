"""The recall experiment: its cells, what they keep, and the hybrids as language models."""

import json
from dataclasses import replace

import pytest
from tiny_experiments import QUIET, SECONDS, suite

from mabert.data.recall import PLACES, RecallTask
from mabert.experiments.catalogue import cells_of
from mabert.experiments.causal_architectures import HYBRIDS
from mabert.experiments.cells import CellStore, run_cells
from mabert.experiments.recall import Recall
from mabert.experiments.scales import SCALES, RecallScale
from mabert.models.causal import MEMORIES

SCALE = replace(
    SECONDS,
    recall=RecallScale(
        hidden_size=16,
        intermediate_size=64,
        vocab_size=128,
        lengths=(32, 48),
        pairs=(3, 8),
        steps=3,
        batch_size=4,
        seeds=2,
        eval_rows=8,
    ),
)


def test_every_architecture_task_length_and_seed_is_a_cell():
    names = [cell.name for cell in Recall(SCALE, QUIET).cells()]
    assert len(names) == len(set(names)) == len(HYBRIDS) * (3 + 2 + 2) * 2
    assert "recall/parallel-merge-attention/phonebook@3/48/1" in names
    assert "recall/sequential/mqar@8/48/0" in names
    assert "recall/sequential/mqar@8/32/0" not in names, "no room for so many"
    assert "recall/sequential/passkey/32/0" in names


def test_a_cell_keeps_what_was_recalled_by_place_and_memory(tmp_path):
    store = CellStore(tmp_path / "results", tmp_path / "work")
    task = RecallTask(kind="mqar", length=48, pairs=3, vocab_size=128)
    cell = Recall(SCALE, QUIET).cell("sequential", "mqar@3", task, 1)
    run_cells([cell], store, console=QUIET)
    content = json.loads(store.path(cell).read_text())
    assert content["config"]["task"] == {
        "kind": "mqar",
        "length": 48,
        "pairs": 3,
        "place": "spread",
        "vocab_size": 128,
    }
    assert content["config"]["run"]["seed"] == 1
    result = content["result"]
    assert result["accuracy"].keys() == set(PLACES)
    assert result["probes"].keys() == MEMORIES.keys()
    assert result["probes"]["both"] == result["accuracy"]["spread"]
    assert len(result["losses"]) == 3


def test_hybrids_share_the_references_of_transmamba(tmp_path):
    ours = suite(tmp_path)
    names = {cell.name for cell in cells_of(["hybrids"], ours)}
    assert {f"causal/{name}/0" for name in HYBRIDS} <= names
    both = cells_of(["hybrids", "transpoints"], ours)
    assert sum(cell.name == "causal/Transformer/0" for cell in both) == 1


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_can_ask_what_it_plans(scale):
    recall = SCALES[scale]().recall
    asked = {(task.kind, task.length) for _, task in recall.settings()}
    assert asked == {(kind, length) for kind in recall.kinds for length in recall.lengths}


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
    ],
)
def test_scales_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecallScale(**changes)
