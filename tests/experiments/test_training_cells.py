"""The cells that train: what they keep, what they share, and that dev chooses nothing."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_experiments import QUIET, SECONDS, suite, write_data

from mabert.data import generated
from mabert.data.corpus import CorpusError
from mabert.experiments.cells import CellStore, run_cells
from mabert.experiments.finetuning import Contender
from mabert.experiments.sources import Sources


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """MaBERT and BERT pretrained, tuned, scored and compared on real-looking data."""
    folder = tmp_path_factory.mktemp("cells")
    data = write_data(folder / "data")
    ours = suite(folder, data=data)
    mabert, bert = ours.pretraining.checkpoints("MaBERT"), ours.pretraining.checkpoints("BERT")
    cells = [
        *ours.finetuning.scores(mabert),
        *ours.finetuning.scores(mabert, {"psm": "none", "pooling": "cls"}),
        ours.finetuning.comparison(Contender(mabert), Contender(bert), "RTE"),
    ]
    run_cells(cells, ours.finetuning.store, console=QUIET)
    return ours, cells, folder


def content(made, name):
    return json.loads((made[2] / "results" / f"{name}.json").read_text())


def test_a_pretraining_keeps_its_curve_and_its_size(made):
    result = content(made, "pretraining/MaBERT/0")["result"]
    weights = made[2] / "work" / "pretraining" / "MaBERT" / "0" / "model.safetensors"
    assert result["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    for name in ("tuning/MaBERT/0/RTE", "finetuning/MaBERT/0/RTE/0"):
        assert content(made, name)["result"]["weights"] == result["weights"]
    assert [point["step"] for point in result["evaluations"] if point["length"] == 16] == [1, 2, 3, 4]
    assert [held["length"] for held in result["held_out"]] == [16, 32]
    assert result["tokens"] == 4 * (2 * 16 + 2 * 32)
    assert result["encoder_parameters"] < result["parameters"]
    assert result["model"]["pattern"] == "MMTMMTMMTMMT"


def test_all_architectures_read_the_same_rows(made):
    ours, theirs = (content(made, f"pretraining/{name}/0") for name in ("MaBERT", "BERT"))
    assert {key: value for key, value in ours["config"].items() if key != "architecture"} == {
        key: value for key, value in theirs["config"].items() if key != "architecture"
    }
    assert ours["result"]["tokens"] == theirs["result"]["tokens"]
    for one, other in zip(ours["result"]["held_out"], theirs["result"]["held_out"], strict=True):
        assert one["labels"] == other["labels"]
        assert one["unigram_entropy"] == other["unigram_entropy"]


def test_the_grid_is_written_down_and_the_best_of_it_taken(made):
    tuning = content(made, "tuning/MaBERT/0/RTE")
    assert [point["learning_rate"] for point in tuning["config"]["grid"]] == [1e-3, 1e-2]
    tried = tuning["result"]["tried"]
    assert len(tried) == 2
    best = max(tried, key=lambda point: point["metrics"]["accuracy"])
    assert tuning["result"]["choice"] == {name: best[name] for name in ("learning_rate", "batch_size", "epochs")}
    assert content(made, "finetuning/MaBERT/0/RTE/1")["result"]["choice"] == tuning["result"]["choice"]


def test_the_dev_set_chooses_nothing(tmp_path):
    data = write_data(tmp_path / "data")
    ours = suite(tmp_path, data=data)
    (checkpoint,) = ours.pretraining.checkpoints("MaBERT")
    (data / "glue" / "RTE" / "dev.tsv").write_text("unreadable")
    run_cells([ours.finetuning.tuning(checkpoint, "RTE")], ours.finetuning.store, console=QUIET)


def test_a_run_keeps_its_scores_and_predictions(made):
    ours = made[0]
    for seed in (0, 1):
        result = content(made, f"finetuning/MaBERT/0/RTE/{seed}")["result"]
        dev = result["splits"]["dev"]
        predicted = np.array([int(digit) for digit in result["predictions"]["dev"]])
        gold = np.array(ours.finetuning.sources.gold("RTE")["dev"])
        assert dev["metrics"]["accuracy"] == pytest.approx((predicted == gold).mean())
        assert dev["rows"] == len(gold)
        assert "subset, 24 rows" in dev["subset"]


def configs_of(cells, monkeypatch, training):
    """What the cells would have given to a training, which they name by where they find it."""
    seen = []

    def record(config, **kwargs):
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(training, record)
    for cell in cells:
        with pytest.raises(InterruptedError):
            cell.run()
    return seen


def test_each_run_has_its_own_seed_and_all_of_them_the_scales_choices(made, monkeypatch):
    ours = made[0]
    checkpoints = ours.pretraining.checkpoints("MaBERT")
    kinds = (ours.finetuning, at(ours.finetuning, bf16=True))
    cells = [cell for finetuning in kinds for cell in finetuning.runs(checkpoints, "RTE")]
    seen = configs_of(cells, monkeypatch, "mabert.experiments.finetuning.finetune")
    assert [config.seed for config in seen] == [0, 1, 0, 1]
    assert {(config.max_train_rows, config.max_length) for config in seen} == {(16, 16)}
    assert [config.bf16 for config in seen] == [False, False, True, True]


def at(cells, **changes):
    """The same at a scale with other choices."""
    return replace(cells, sources=replace(cells.sources, scale=replace(cells.sources.scale, **changes)))


# each another value than the default of `pretrain` or of the scale
PRETRAINING = {
    "steps": 5,
    "batch_size": 6,
    "micro_batch_size": 3,
    "stage_lengths": (24, 32),
    "stage_fractions": (0.25, 0.75),
    "learning_rate": 0.003,
    "warmup_fraction": 0.2,
    "bf16": True,
    "eval_rows": 7,
}


def test_every_choice_of_a_pretraining_reaches_it_and_its_config(made, monkeypatch):
    cell = at(made[0].pretraining, **PRETRAINING).cell("MaBERT", 0.5, seed=3)
    (config,) = configs_of([cell], monkeypatch, "mabert.experiments.pretraining.pretrain")
    for name, value in (PRETRAINING | {"budget": 0.5, "seed": 3, "packing": "full-sentences"}).items():
        assert getattr(config, name) == value, name
        assert name == "micro_batch_size" or cell.config[name] == value, name


def test_no_fine_tuned_model_is_left(made):
    assert not list((made[2] / "work" / "finetuning").rglob("*.safetensors"))
    assert list((made[2] / "work" / "pretraining").rglob("*.safetensors"))


def test_of_a_pretraining_only_the_model_is_left(made):
    folder = made[2] / "work" / "pretraining" / "MaBERT" / "0"
    assert (folder / "model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))


def test_variants_share_one_checkpoint_and_are_padded_to_one_length(made, monkeypatch):
    ours, _, _ = made
    plain, variant = (content(made, f"finetuning/MaBERT{suffix}/0/RTE/0") for suffix in ("", "~psm=none,pooling=cls"))
    assert plain["config"]["checkpoint"] == variant["config"]["checkpoint"]
    assert variant["config"]["variant"] == {"psm": "none", "pooling": "cls"}

    (checkpoint,) = ours.pretraining.checkpoints("MaBERT")
    cell = ours.finetuning.run(checkpoint, "RTE", 0, {"psm": "post", "pooling": "mean"})
    (config,) = configs_of([cell], monkeypatch, "mabert.experiments.finetuning.finetune")
    assert (config.psm, config.pooling, config.execution) == ("post", "mean", "padded")
    assert config.pad_to_max_length


def test_a_comparison_is_that_of_the_kept_predictions(made):
    result = content(made, "comparisons/MaBERT--BERT/RTE")["result"]["splits"]["dev"]
    means = [
        np.mean(
            [
                content(made, f"finetuning/{name}/0/RTE/{seed}")["result"]["splits"]["dev"]["metrics"]["accuracy"]
                for seed in (0, 1)
            ]
        )
        for name in ("MaBERT", "BERT")
    ]
    assert result["difference"] == pytest.approx(means[0] - means[1])
    assert result["low"] <= result["difference"] <= result["high"]
    assert result["seeds"] == 2


def test_a_comparison_pairs_the_seeds(tmp_path, monkeypatch):
    """Seeds of very different quality, and the other model 5 rows worse than each: only paired is that so sure."""
    ours = suite(tmp_path, replace(SECONDS, finetuning_seeds=4, pretraining_seeds=2))
    gold = np.arange(400) % 2
    monkeypatch.setattr(Sources, "gold", lambda self, task: {"dev": gold.tolist()})
    contenders = [Contender(ours.pretraining.checkpoints(name)) for name in ("MaBERT", "BERT")]
    wrong = {}
    for worse, contender in enumerate(contenders):
        for number, cell in enumerate(ours.finetuning.runs(contender.checkpoints, "acceptability")):
            wrong[cell.name] = 20 * number + 5 * worse
    monkeypatch.setattr(
        CellStore,
        "read",
        lambda self, cell: {
            "predictions": {"dev": "".join(map(str, np.where(np.arange(400) < wrong[cell.name], 1 - gold, gold)))}
        },
    )
    (found,) = ours.finetuning.comparison(*contenders, "acceptability").run()["splits"].values()
    assert found["difference"] == pytest.approx(5 / 400)
    assert 0 < found["low"] < found["high"] < 10 / 400
    assert (found["seeds"], found["pretrained"]) == (8, 2)


def test_variants_are_compared_as_variants(made):
    ours = made[0]
    checkpoints = ours.pretraining.checkpoints("MaBERT")
    full, less = (Contender(checkpoints, {"psm": psm, "pooling": "map"}) for psm in ("pre+post", "none"))
    cell = ours.finetuning.comparison(full, less, "RTE")
    assert cell.name == "comparisons/MaBERT~psm=pre+post,pooling=map--MaBERT~psm=none,pooling=map/RTE"
    assert [run["variant"]["psm"] for run in cell.config["runs"]] == ["pre+post"] * 2 + ["none"] * 2


def test_nothing_finished_is_repeated(made, monkeypatch):
    ours, cells, _ = made
    from mabert.experiments import finetuning, pretraining

    def never(*args, **kwargs):
        raise AssertionError("repeated")

    monkeypatch.setattr(finetuning, "finetune", never)
    monkeypatch.setattr(pretraining, "pretrain", never)
    run_cells(cells, ours.finetuning.store, console=QUIET)


def test_a_budget_and_a_seed_are_cells_of_their_own(tmp_path):
    ours = suite(tmp_path, replace(SECONDS, pretraining_seeds=2))
    names = [checkpoint.needs[0].name for checkpoint in ours.pretraining.checkpoints("BERT", 0.5)]
    assert names == ["pretraining/BERT@50/0", "pretraining/BERT@50/1"]
    run_cells([ours.pretraining.cell("BERT", 0.5)], ours.finetuning.store, console=QUIET)
    content = json.loads((tmp_path / "results" / "pretraining" / "BERT@50" / "0.json").read_text())
    assert content["result"]["steps"] == 2


def test_scores_on_other_data_are_refused(tmp_path):
    data = write_data(tmp_path / "data")
    ours = suite(tmp_path, replace(SECONDS, learning_rates=(1e-3,), finetuning_seeds=1), data)
    cells = list(ours.finetuning.scores(ours.pretraining.checkpoints("MaBERT")))
    run_cells(cells, ours.finetuning.store, console=QUIET)
    dev = data / "glue" / "RTE" / "dev.tsv"
    dev.write_text(dev.read_text().replace("cat", "cot"))  # as long as before
    ours = suite(tmp_path, replace(SECONDS, learning_rates=(1e-3,), finetuning_seeds=1), data)
    again = list(ours.finetuning.scores(ours.pretraining.checkpoints("MaBERT")))
    with pytest.raises(ValueError, match="was made with other choices: data was"):
        run_cells(again, ours.finetuning.store, console=QUIET)


def test_other_text_is_prepared_apart(tmp_path):
    data = write_data(tmp_path / "data")
    folders = {
        Sources(SECONDS, tmp_path).folder,
        Sources(SECONDS, tmp_path, data).folder,
        Sources(replace(SECONDS, text_lines=100), tmp_path, data).folder,
    }
    assert len(folders) == 3


def test_other_text_of_the_same_size_is_other_text(tmp_path):
    data = write_data(tmp_path / "data")
    before = Sources(SECONDS, tmp_path, data).cell().config
    text = next((data / "text").glob("*.train.txt"))
    text.write_text(text.read_text().swapcase())
    assert Sources(SECONDS, tmp_path, data).cell().config != before


def test_other_code_makes_other_generated_data(tmp_path, monkeypatch):
    before = Sources(SECONDS, tmp_path)
    text, task = before.cell().config, before.task_identity("acceptability")
    (tmp_path / "generated.py").write_text("# other code\n")
    monkeypatch.setattr(generated, "__file__", str(tmp_path / "generated.py"))
    now = Sources(SECONDS, tmp_path)
    assert now.cell().config != text
    assert now.task_identity("acceptability") != task


def test_tables_that_other_code_generated_are_not_taken(tmp_path, monkeypatch):
    sources = Sources(SECONDS, tmp_path)
    before = sources.task_choices("acceptability")["train"].read_text()
    (tmp_path / "generated.py").write_text("# other code\n")
    monkeypatch.setattr(generated, "__file__", str(tmp_path / "generated.py"))

    def write_tables(folder):
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_text("sentence\tlabel\n")

    monkeypatch.setattr(generated, "write_tables", write_tables)
    assert sources.task_choices("acceptability")["train"].read_text() != before


def test_the_text_is_cut_at_the_scales_lines(tmp_path):
    data = write_data(tmp_path / "data")
    sources = Sources(replace(SECONDS, text_lines=50), tmp_path / "work", data)
    sources.cell().run()
    (train,) = sources.texts("train")
    with open(train) as file:  # noqa: PTH123
        assert len(file.readlines()) == 50


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "some.train.txt").write_text("A line.\n")
    with pytest.raises(CorpusError, match=r"text holds no \*\.valid\.txt.*or leave it out to generate text"):
        Sources(SECONDS, tmp_path / "work", tmp_path).cell()
