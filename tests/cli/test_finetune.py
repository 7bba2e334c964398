"""`mabert finetune`: GLUE tasks and tables of one's own, the dry run and the real one."""

import json
import random
import re
from pathlib import Path

import pytest
from tiny_models import sentence, write_mabert
from typer.testing import CliRunner, Result

from mabert.experiments.recipes.finetune import RECIPES
from mabert_cli.app import app

QUICK = ["epochs=1", "batch_size=8", "learning_rate=0.001", "max_length=32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mabert(tmp_path_factory.mktemp("model"))


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(sentence(rng), sentence(rng)) for _ in range(count)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "train.csv"
    lines = [f"{text},{'yes' if 'cat' in text else 'no'}" for text, _ in rows(40, 0)]
    path.write_text("\n".join(["words,verdict", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    (folder / "RTE").mkdir()
    for split, count in (("train", 24), ("dev", 12)):
        lines = [
            f"{index}\t{a}\t{b}\t{'entailment' if index % 3 else 'not_entailment'}"
            for index, (a, b) in enumerate(rows(count, count))
        ]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n"
        (folder / "RTE" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["finetune", *words])


def plain(text: str) -> str:
    return " ".join(text.split())


def test_it_finetunes_on_a_table(model: Path, table: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    words = ["table", f"train={table}", f"model={model}", f"output={tmp_path / 'run'}", *QUICK]
    result = run(*words, "text_column=words", "label_column=verdict", "dev_fraction=0.25")
    assert result.exit_code == 0, result.output
    number = r"-?[01]\.\d{4}"
    scores = rf"accuracy {number}, mcc {number} \(majority class {number}, {number}\)"
    assert re.search(rf"dev \(held out of train, 10 rows\) {scores}", plain(result.stdout))
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert tuned.config.id2label == {0: "no", 1: "yes"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["train_rows"] == 30
    assert metrics["config"]["learning_rate"] == 0.001


def test_it_finetunes_on_a_glue_task(model: Path, glue: Path, tmp_path: Path) -> None:
    result = run("glue", "task=rte", f"glue={glue}", f"model={model}", f"output={tmp_path / 'run'}", *QUICK)
    assert result.exit_code == 0, result.output
    assert "dev (subset, 12 rows; train subset, 24 rows) accuracy" in plain(result.stdout)


def test_a_dry_run_shows_everything_and_writes_nothing(model: Path, glue: Path, tmp_path: Path) -> None:
    words = ["glue", "task=RTE", f"glue={glue}", f"model={model}", f"output={tmp_path / 'run'}", *QUICK]
    words[-1] = "max_length=16"
    result = run(*words, "select=best", "select_fraction=0.25", "--dry-run")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    for row in (
        "task RTE",
        "select best",
        "pooling none",
        "labels entailment, not_entailment",
        "train 18 rows",
        "cut to 16 tokens",
        "dev 12 rows",
        "selection 6 rows",
        "metrics accuracy",
        "steps 3, 0 of them warm-up",
    ):
        assert row in text, row
    assert re.search(r"parameters [\d,]+", text)
    assert re.search(r"tokens \d+", text)
    assert re.search(r"longest rows \d+\.\d\d s a step time \d:\d\d:\d\d", text)
    assert re.search(r"memory [\d.]+ MiB", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gleu"], "there is no recipe 'gleu'. Did you mean glue?"),
        (["glue", "task=RTE"], "recipe glue needs glue=…, model=…, output=…"),
        (["table", "train=t.tsv", "model=m", "output=o", "epoch=2"], "Did you mean epochs"),
        (["table", "train=t.tsv", "model=m", "output=o", "select=first"], "select takes one of last, best"),
        (["table", "train=t.tsv", "model=m", "output=o"], "m is not a model folder"),
        (["glue", "task=RTX", "glue=g", "model=m", "output=o"], "RTE"),
    ],
)
def test_bad_input_is_refused(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in plain(result.stderr)


def test_a_table_without_the_label_column_names_file_and_line(model: Path, table: Path, tmp_path: Path) -> None:
    result = run("table", f"train={table}", f"model={model}", f"output={tmp_path / 'run'}", "text_column=words", *QUICK)
    assert result.exit_code == 2
    assert "train.csv, line" in plain(result.stderr)
    assert "'label'" in plain(result.stderr)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_how_to_run_it(name: str) -> None:
    text = plain(RECIPES[name].__doc__ or "")
    assert f"Command: mabert finetune {name}" in text
    assert "Duration:" in text
    assert "Expected score:" in text
