"""Which cells make up each experiment, and with which choices."""

from dataclasses import replace

import pytest
from tiny_experiments import QUIET, SECONDS, suite, write_data

from mabert.experiments.catalogue import EXPERIMENTS, cells_of
from mabert.experiments.cells import Cell, run_cells
from mabert.experiments.finetuning import main_metric

FIVE = ["BERT", "ALBERT", "Longformer", "BigBird", "DeBERTa"]
ABLATED = ["MaBERT", "MaBERT-forward-causal"]


@pytest.fixture
def cells(tmp_path):
    """Of an experiment, by name, at a scale of one task, two budgets and two patterns."""
    ours = suite(tmp_path)
    return lambda name: {cell.name: cell for cell in cells_of([name], ours)}


def models(cells, kind):
    """The second part of the names of one kind."""
    return list(dict.fromkeys(name.split("/")[1] for name in cells if name.startswith(f"{kind}/")))


def variant(psm, pooling):
    return f"~psm={psm},pooling={pooling}"


def test_patterns_are_pretrained_for_their_budget(tmp_path):
    ours = suite(tmp_path, replace(SECONDS, pattern_budget=0.5))
    found = {cell.name: cell for cell in cells_of(["patterns"], ours)}
    assert models(found, "pretraining") == ["MaBERT@50", "TTTTTTTTTTTT@50"]
    assert models(found, "comparisons") == ["MaBERT@50--TTTTTTTTTTTT@50"]


def test_budgets_compare_the_six_models_after_each(cells):
    found = cells("budgets")
    six = ["MaBERT", *FIVE]
    assert models(found, "pretraining") == models(found, "finetuning") == [*(f"{name}@50" for name in six), *six]
    assert [found[f"pretraining/{name}/0"].config["budget"] for name in ("BERT@50", "BERT")] == [0.5, 1.0]
    assert models(found, "comparisons") == [
        *(f"MaBERT@50--{name}@50" for name in FIVE),
        *(f"MaBERT--{name}" for name in FIVE),
    ]


def test_ablations_share_a_checkpoint_and_are_compared_with_the_full_model(cells):
    found = cells("ablations")
    names = [variant(psm, pooling) for psm in ("pre+post", "none") for pooling in ("map", "cls")]
    assert models(found, "pretraining") == ABLATED
    assert models(found, "finetuning") == [f"{model}{name}" for model in ABLATED for name in names]
    assert models(found, "comparisons") == [
        f"{model}{names[0]}--{model}{name}" for model in ABLATED for name in names[1:]
    ]
    for psm, pooling in (("pre+post", "cls"), ("none", "map")):
        cell = found[f"finetuning/MaBERT{variant(psm, pooling)}/0/acceptability/0"]
        assert cell.config["variant"] == {"psm": psm, "pooling": pooling}
        assert "pretraining/MaBERT/0" in [need.name for need in cell.needs]


def test_poolings_all_have_the_masks(cells):
    found = cells("pooling")
    names = [variant("pre+post", pooling) for pooling in ("map", "attention", "cls", "mean")]
    assert models(found, "finetuning") == [f"{model}{name}" for model in ABLATED for name in names]
    assert len(models(found, "comparisons")) == 6


def test_drift_is_measured_in_both_directions_with_both_convolutions_on_both_sides(cells):
    assert {tuple(name.split("/")[2:]) for name in cells("drift") if name.startswith("drift/")} == {
        (f"{direction}-{convolution}", side)
        for direction in ("forward", "bidirectional")
        for convolution in ("centered", "causal")
        for side in ("right", "left")
    }


def test_baselines_and_directions_are_compared_with_mabert(cells):
    others = [*FIVE, "ModernBERT", "MMMMMMMMMMMM", "TTTTTTTTTTTT", "TTTTTTTTTTTT+rope"]
    assert models(cells("baselines"), "comparisons") == [f"MaBERT--{name}" for name in others]
    directions = models(cells("directions"), "pretraining")
    assert "MaBERT" in directions
    assert "MaBERT-bidirectional-causal" in directions
    assert len(models(cells("directions"), "comparisons")) == len(directions) - 1


def test_each_seed_is_fine_tuned_on_its_own(cells):
    seeds = [cell.config["seed"] for name, cell in cells("patterns").items() if name.startswith("finetuning/MaBERT/")]
    assert seeds == list(range(SECONDS.finetuning_seeds))


def test_all_is_every_experiment(cells):
    everything = cells("all")
    for name in EXPERIMENTS:
        assert cells(name).keys() <= everything.keys()


def test_all_leaves_out_times_where_some_are_of_another_machine(tmp_path, caplog):
    ours = suite(tmp_path)
    timed = next(cell for cell in cells_of(["efficiency"], ours) if cell.alone)
    elsewhere = Cell(timed.name, timed.config | {"hardware": "another card"}, dict)
    run_cells([elsewhere], ours.finetuning.store, console=QUIET)
    found = {cell.name for cell in cells_of(["all"], ours)}
    assert not any(name.startswith("efficiency/") for name in found)
    assert any(name.startswith("causal-step/") for name in found), "of which none was measured elsewhere"
    assert any(name.startswith("pretraining/") for name in found)
    assert "efficiency: times are left out" in caplog.text
    assert "another card" in caplog.text
    with pytest.raises(ValueError, match="hardware was 'another card'"):
        run_cells(cells_of(["efficiency"], ours), ours.finetuning.store, console=QUIET)


def test_what_measures_no_time_stays_where_times_are_left_out(tmp_path):
    ours = suite(tmp_path)
    of_losses = {cell.name for cell in ours.transpoints() if not cell.alone}
    timed = next(cell for cell in cells_of(["transpoints"], ours) if cell.alone)
    elsewhere = Cell(timed.name, timed.config | {"hardware": "another card"}, dict)
    run_cells([elsewhere], ours.finetuning.store, console=QUIET)
    found = {cell.name for cell in ours.all()}
    assert any(name.startswith("causal/TransMamba") for name in of_losses)
    assert of_losses <= found
    assert timed.name not in found


def test_without_cola_drift_is_that_of_generated_sentences(tmp_path):
    ours = suite(tmp_path, data=write_data(tmp_path / "data"))  # which has RTE and MNLI
    cells = [cell for cell in cells_of(["drift"], ours) if cell.name.startswith("drift/")]
    assert {cell.config["data"] for cell in cells} == {"generated sentences"}
    cola = tmp_path / "data" / "glue" / "CoLA"
    cola.mkdir()
    (cola / "dev.tsv").write_text("a\t1\t\tA cat sat.\n")
    assert suite(tmp_path, data=tmp_path / "data").pretraining.sources.sentences() == ("CoLA dev", ["A cat sat."])


def test_tasks_are_compared_by_the_metric_of_the_paper():
    metrics = {
        task: main_metric(task) for task in ("CoLA", "SST-2", "MRPC", "QQP", "MNLI", "QNLI", "RTE", "acceptability")
    }
    assert metrics == {
        "CoLA": "mcc",
        "SST-2": "accuracy",
        "MRPC": "f1",
        "QQP": "f1",
        "MNLI": "accuracy",
        "QNLI": "accuracy",
        "RTE": "accuracy",
        "acceptability": "accuracy",
    }
