"""`mabert pretrain`: recipes, `key=value`, the dry run and the real one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_pretraining
from tiny_pretraining import losses
from typer.testing import CliRunner, Result

from mabert.experiments.recipes.pretrain import RECIPES
from mabert.training.callbacks import read_lines
from mabert_cli.app import app

QUICK = {f"model.{name}": value for name, value in tiny_pretraining.MODEL.items()} | {
    "steps": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "stage_lengths": "16,32",
    "stage_fractions": "0.5,0.5",
    "valid_fraction": 0.2,
    "eval_rows": 8,
    "workers": 0,
    "tensorboard": "false",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a tokenizer."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny_pretraining.prepare(folder)
    return folder


def arguments(work: Path, output: Path, **changes: object) -> list[str]:
    values = {"train": work / "text.txt", "tokenizer": work / "tokenizer", "output": output} | QUICK | changes
    return ["pretrain", "tiny", *(f"{key}={value}" for key, value in values.items())]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def plain(text: str) -> str:
    return " ".join(text.split())


def test_it_pretrains_and_leaves_a_model(work: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    result = run(*arguments(work, tmp_path / "run", learning_rate=0.01))
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.output
    assert "unigram entropy" in result.output
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    assert (model.config.pattern, model.config.hidden_size) == ("MT", 16)
    steps = read_lines(tmp_path / "run" / "log.jsonl")
    assert [step["stage"] for step in steps] == [0, 0, 1, 1]
    assert max(step["learning_rate"] for step in steps) == pytest.approx(0.01)


def test_a_dry_run_shows_everything_and_writes_nothing(work: Path, tmp_path: Path) -> None:
    result = run(*arguments(work, tmp_path / "run"), "--dry-run")
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    for row in (
        "model.pattern MT ",
        "stage_lengths 16,32 ",
        "shards none",
        "init_from none",
        "bf16 false",
        "steps 4, 0 of them warm-up",
        "batch 4 sequences: 1 process × 2 × 2",
        "stage 1 2 steps of 16 tokens a sequence: 128 tokens",
        "stage 2 2 steps of 32 tokens a sequence: 256 tokens",
        "tokens 384",
        "not tokenised yet",
    ):
        assert row in text, row
    assert re.search(r"parameters [\d,]+", text)
    assert re.search(r"stage 2 \d+\.\d\d s a step", text)
    assert re.search(r"memory \d+\.\d MiB in each process \(weights", text)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_epochs_once_the_text_is_tokenised(work: Path, tmp_path: Path) -> None:
    assert run(*arguments(work, tmp_path / "run")).exit_code == 0
    result = run(*arguments(work, tmp_path / "run"), "--dry-run")
    assert re.search(r"128 tokens, 0\.\d\d epochs", plain(result.output))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete_and_says_how_to_run_it(name: str) -> None:
    config = RECIPES[name](train=("text.txt",), tokenizer=Path("tokenizer"), output=Path("out"))
    if name.startswith(("transmamba", "hybrid")):
        assert config.model.model_type in ("transmamba", "mabert_hybrid")
        assert config.stage_lengths == (config.model.max_position_embeddings,)
    else:
        assert config.model.pattern == "MMTMMTMMTMMT"
        assert config.stage_lengths == (128, 512)
    text = plain(RECIPES[name].__doc__ or "")
    assert f"Command: mabert pretrain {name} train=" in text
    assert "Duration:" in text
    assert "Expected score:" in text
    assert re.search(rf"\b{name}\b", plain(run("pretrain", "--help").output))


def test_the_base_recipe_is_the_papers() -> None:
    config = RECIPES["base"](train=("text.txt",), tokenizer=Path("tokenizer"), output=Path("out"))
    assert (config.steps, config.batch_size, config.model.hidden_size) == (1_000_000, 256, 768)
    assert (config.stage_lengths, config.stage_fractions) == ((128, 512), (0.9, 0.1))
    assert (config.learning_rate, round(config.steps * config.warmup_fraction)) == (6e-4, 24_000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "tny", "train=x"], "there is no recipe 'tny'. Did you mean tiny"),
        (["pretrain", "tiny", "train=x"], "recipe tiny needs tokenizer=…, output=…"),
        (["pretrain", "tiny", "train=x", "tokenizer=t", "output=o", "stps=3"], "Did you mean steps"),
        (["pretrain", "tiny", "train=x", "tokenizer=t", "output=o", "steps=few"], "steps takes a whole number"),
        (["pretrain", "tiny", "train=x", "tokenizer=t", "output=o", "model.vocab_size=9"], "comes from the tokenizer"),
        (["pretrain", "tiny", "train=x", "tokenizer=t", "output=o", "budget=2"], "budget=2.0 must be above 0"),
        (["pretrain", "tiny", "train=x", "tokenizer=t", "output=o", "model.psm=pre"], "execution='padded'"),
        (["pretrain", "tiny", "train=x", "tokenizer=/nowhere", "output=o"], "/nowhere holds no tokenizer"),
        (["pretrain", "tiny", "train=x", "tokenizer=t", "output=o", "init_from=m"], "init_from"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert message in plain(result.stderr)
    assert not list(tmp_path.iterdir())


def test_it_starts_from_a_pretrained_model(work: Path, tmp_path: Path) -> None:
    assert run(*arguments(work, tmp_path / "first")).exit_code == 0
    words = [word for word in arguments(work, tmp_path / "second") if not word.startswith("model.")]
    result = run(*words, f"init_from={tmp_path / 'first'}", "model=none")
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]


def test_ctrl_c_saves_and_the_same_command_goes_on(work: Path, tmp_path: Path) -> None:
    words = arguments(work, tmp_path / "run", steps=30, checkpoint_every=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "mabert_cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, message
    assert "Stopped by SIGINT" in message
    assert "Traceback" not in message
    done = len(losses(tmp_path / "run"))
    assert 0 < done < 30
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "going on from" in result.stderr
    assert len(losses(tmp_path / "run")) == 30
