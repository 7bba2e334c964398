"""`mabert pretrain` and `mabert finetune` refuse to go on with a run that was begun with other choices."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_finetuning
import tiny_pretraining
from tiny_models import write_bert, write_mabert
from typer.testing import CliRunner, Result

from mabert_cli.app import app


def run(words: list[str]) -> Result:
    return CliRunner().invoke(app, words)


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command whose run is there."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny_pretraining.prepare(folder)
    changes = {f"model.{name}": value for name, value in tiny_pretraining.MODEL.items()} | {
        "train": folder / "text.txt",
        "tokenizer": folder / "tokenizer",
        "output": folder / "run",
        "steps": 2,
        "batch_size": 2,
        "micro_batch_size": 2,
        "stage_lengths": "16,32",
        "stage_fractions": "0.5,0.5",
        "valid_fraction": 0.2,
        "eval_rows": 4,
        "workers": 0,
        "tensorboard": "false",
    }
    words = ["pretrain", "tiny", *(f"{key}={value}" for key, value in changes.items())]
    result = run(words)
    assert result.exit_code == 0, result.output
    return words


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command whose run is there."""
    folder = tiny_finetuning.prepare(tmp_path_factory.mktemp("finetune"))
    paths = [f"train={folder / 'train.tsv'}", f"model={folder / 'mlm'}", f"output={folder / 'run'}"]
    words = ["finetune", "table", *paths, "max_train_rows=32", "epochs=1", "max_length=16"]
    result = run(words)
    assert result.exit_code == 0, result.output
    return words


def changed(words: list[str], *changes: str) -> list[str]:
    keys = [change.partition("=")[0] for change in changes]
    return [*(word for word in words if word.partition("=")[0] not in keys), *changes]


def refused(words: list[str], message: str) -> None:
    result = run(words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def refused_to_go_on(words: list[str], change: str, differs: str, finished: bool, copy: Path) -> None:
    """Start the command with one choice changed in a copy of its run: it says which, and leaves all as it was."""
    shutil.copytree(next(word for word in words if word.startswith("output=")).partition("=")[2], copy)
    if not finished:
        (copy / "metrics.json").unlink()
    before = state(copy)
    refused(changed(words, f"output={copy}", change), f"{copy} holds a run with other choices: {differs}. Take the old")
    assert state(copy) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("model.pattern=TM", "model.pattern was 'MT', is now 'TM'"),
        ("steps=3", "steps was 2, is now 3"),
    ],
)
def test_pretraining_does_not_go_on_with_another_config(
    pretraining: list[str], change: str, differs: str, finished: bool, tmp_path: Path
) -> None:
    refused_to_go_on(pretraining, change, differs, finished, tmp_path / "run")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("pooling=mean", "pooling was None, is now 'mean'"),
        ("max_length=12", "max_length was 16, is now 12"),
    ],
)
def test_finetuning_does_not_go_on_with_another_config(
    finetuning: list[str], change: str, differs: str, finished: bool, tmp_path: Path
) -> None:
    refused_to_go_on(finetuning, change, differs, finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pattern=TM", "there is no field 'model.pattern'"),
        ("psm=pre", "execution='packed' never computes"),
        ("max_length=64", "max_length=64 is over the model's maximum of 32 tokens"),
    ],
)
def test_finetuning_takes_no_setting_that_contradicts_the_model(
    finetuning: list[str], change: str, message: str, tmp_path: Path
) -> None:
    refused(changed(finetuning, f"output={tmp_path / 'run'}", change), message)
    assert not (tmp_path / "run").exists()


def test_finetuning_takes_no_setting_that_the_model_does_not_have(finetuning: list[str], tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    words = changed(finetuning, f"output={tmp_path / 'run'}", f"model={bert}", "psm=exact")
    refused(words, f"the bert model in {bert} has no setting psm")


def test_finetuning_takes_no_weights_of_another_config(finetuning: list[str], tmp_path: Path) -> None:
    folder = write_mabert(tmp_path / "mlm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pattern": "MTT"}))
    words = changed(finetuning, f"output={tmp_path / 'run'}", f"model={folder}")
    refused(words, f"the weights in {folder} do not belong to its config.json")
