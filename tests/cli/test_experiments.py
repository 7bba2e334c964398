"""`mabert experiment`, `mabert glue`: what they run, show, refuse and resume."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_experiments
import torch
from tiny_models import write_bert, write_mabert
from typer.testing import CliRunner, Result

from mabert_cli.app import app

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "vocab_size": 400,
    "steps": 3,
    "batch_size": 4,
    "micro_batch_size": 4,
    "stage_lengths": "16,32",
    "eval_rows": 8,
    "patterns": "TTTTTTTTTTTT",
    "max_train_rows": 16,
    "max_length": 16,
    "finetuning_seeds": 1,
}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def plain(text: str) -> str:
    return " ".join(text.split())


def arguments(folder: Path, *names: str, **changes: object) -> list[object]:
    sizes = [f"{key}={value}" for key, value in (SIZES | changes).items()]
    return ["experiment", *names, *sizes, "--results", folder / "results", "--work", folder / "work", "--jobs", "1"]


def test_an_experiment_runs_and_is_not_repeated(tmp_path: Path) -> None:
    first = run(*arguments(tmp_path, "patterns"))
    assert first.exit_code == 0, first.output
    cells = {path: path.read_bytes() for path in (tmp_path / "results" / "tiny").rglob("*.json")}
    names = {str(path.relative_to(tmp_path / "results" / "tiny")) for path in cells}
    assert names >= {
        "text.json",
        "pretraining/MaBERT/0.json",
        "pretraining/TTTTTTTTTTTT/0.json",
        "finetuning/MaBERT/0/acceptability/0.json",
        "comparisons/MaBERT--TTTTTTTTTTTT/acceptability.json",
    }
    again = run(*arguments(tmp_path, "patterns"))
    assert again.exit_code == 0
    assert "to compute, with what they need: 0" in plain(again.stderr)
    assert {path: path.read_bytes() for path in cells} == cells


def test_other_choices_are_refused_and_named(tmp_path: Path) -> None:
    assert run(*arguments(tmp_path, "patterns"), "--only", "pretraining/MaBERT/0").exit_code == 0
    other = run(*arguments(tmp_path, "patterns", steps=4))
    assert other.exit_code == 2
    assert "was made with other choices: steps was 3, is now 4" in plain(other.output)


def test_a_dry_run_shows_the_scale_and_counts_the_cells(tmp_path: Path) -> None:
    shown = run(*arguments(tmp_path, "all"), "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "hidden_size 16" in plain(shown.output)
    for kind in ("pretraining", "tuning", "finetuning", "comparisons", "drift", "efficiency"):
        assert kind in shown.output
    assert "0 of them finished" in plain(shown.output)
    assert not (tmp_path / "work").exists()
    some = run(*arguments(tmp_path, "all"), "--dry-run", "--only", "drift/")
    assert "drift" in some.output
    assert "comparisons" not in some.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pattern"], "there is no experiment 'pattern'. Did you mean patterns?"),
        (["patterns", "--scale", "tinny"], "there is no scale 'tinny'. Did you mean tiny"),
        (["patterns", "stepz=3"], "there is no field 'stepz'. Did you mean steps"),
        (["patterns", "steps=many"], "steps=many does not fit: steps takes a whole number"),
        (["patterns", "name=mine"], "name cannot be set"),
        (["patterns", "--only", "nothing"], "no cell matches 'nothing'"),
        (["steps=3"], "Name one or more experiments"),
    ],
)
def test_bad_words_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    result = run("experiment", *words, "--results", tmp_path / "r", "--work", tmp_path / "w", "--jobs", 1)
    assert result.exit_code == 2
    assert message in plain(result.output)


@pytest.mark.parametrize(("said", "expected"), [("1", []), (None, [6])])
def test_the_cores_are_shared_out_unless_the_environment_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, expected: list[int]
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", said) if said else monkeypatch.delenv("OMP_NUM_THREADS")
    assert run(*arguments(tmp_path, "patterns"), "--only", "text").exit_code == 0
    assert threads == expected


def test_data_without_text_is_refused(tmp_path: Path) -> None:
    result = run(*arguments(tmp_path, "patterns"), "--data", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "text holds no *.train.txt" in plain(result.output)


def test_the_time_ends_a_run_that_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work" / "tiny" / "pretraining" / "MaBERT" / "0"

    class OnceItTrains(threading.Thread):
        """A timer whose time is up after the first step."""

        def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
            super().__init__(daemon=True)
            self.ring = ring
            assert seconds == 60 * 7

        def run(self) -> None:
            while not ((log := folder / "log.jsonl").exists() and log.read_text()):
                time.sleep(0.02)
            self.ring()

        def cancel(self) -> None:
            self.join()

    monkeypatch.setattr(threading, "Timer", OnceItTrains)
    words = arguments(tmp_path, "patterns", steps=100_000)
    stopped = run(*words, "--only", "pretraining/MaBERT/0", "--max-minutes", 7)
    assert stopped.exit_code == 0, stopped.output
    assert "the time is up" in plain(stopped.output)
    assert not (tmp_path / "results" / "tiny" / "pretraining").exists()
    (checkpoint,) = folder.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()


def test_glue_scores_and_compares_models(tmp_path: Path) -> None:
    data = tiny_experiments.write_data(tmp_path / "data")
    first, second = write_mabert(tmp_path / "mabert"), write_bert(tmp_path / "bert")
    words = ["tasks=RTE,MNLI", "max_length=16", "finetuning_seeds=2", "learning_rates=1e-3", "epochs=1"]
    places = ["--results", tmp_path / "results", "--work", tmp_path / "work", "--jobs", 1]
    result = run("glue", first, second, *words, "--data", data, "--scale", "tiny", *places)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "results" / "finetuning" / "bert" / "0" / "RTE" / "1.json").read_text())
    assert content["config"]["checkpoint"].keys() == {"model", "weights", "config", "tokenizer"}
    (second / "config.json").write_text((second / "config.json").read_text() + " ")
    changed = run("glue", first, second, *words, "--data", data, "--scale", "tiny", *places)
    assert changed.exit_code == 2
    assert "was made with other choices: checkpoint was" in plain(changed.output)
    shown = plain(result.stdout)
    for word in ("RTE dev", "MNLI dev_matched", "MNLI dev_mismatched", "(subset,", "mabert - bert", "±", " to "):
        assert word in shown


def test_glue_shows_no_table_of_a_part(tmp_path: Path) -> None:
    data, model = tiny_experiments.write_data(tmp_path / "data"), write_mabert(tmp_path / "mabert")
    words = ["tasks=RTE,MNLI", "max_length=16", "finetuning_seeds=1", "learning_rates=1e-3", "epochs=1"]
    places = ["--results", tmp_path / "results", "--work", tmp_path / "work", "--jobs", 1]
    result = run("glue", model, *words, "--data", data, "--scale", "tiny", *places, "--only", "RTE")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results" / "finetuning" / "mabert" / "0" / "RTE" / "0.json").exists()
    assert "dev set" not in result.stdout


def test_a_cell_that_fails_is_named_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mabert.experiments import pretraining

    original = pretraining.pretrain

    def fails_for_attention(config: Any, **kwargs: Any) -> Any:
        if "/TTTTTTTTTTTT/" in str(config.output):
            raise FloatingPointError("the loss is nan")
        return original(config, **kwargs)

    monkeypatch.setattr(pretraining, "pretrain", fails_for_attention)
    result = run(*arguments(tmp_path, "patterns"))
    assert result.exit_code == 1
    assert "pretraining/TTTTTTTTTTTT/0: FloatingPointError: the loss is nan" in plain(result.output)
    assert (tmp_path / "results" / "tiny" / "finetuning" / "MaBERT" / "0" / "acceptability" / "0.json").exists()


def test_glue_refuses_folders_of_one_name(tmp_path: Path) -> None:
    data = tiny_experiments.write_data(tmp_path / "data")
    folders = [write_mabert(tmp_path / where / "model") for where in ("a", "b")]
    result = run("glue", *folders, "--data", data, "--scale", "tiny")
    assert result.exit_code == 2
    assert "have one name" in plain(result.output)


@pytest.mark.slow
def test_a_killed_experiment_resumes_with_the_same_losses(tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        words = arguments(folder, "patterns", steps=60)
        return [sys.executable, "-m", "mabert_cli", *map(str, words), "--only", "pretraining/MaBERT/0"]

    def losses(folder: Path) -> list[float]:
        log = folder / "work" / "tiny" / "pretraining" / "MaBERT" / "0" / "log.jsonl"
        return [json.loads(line)["loss"] for line in log.read_text().splitlines()]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment)
    killed = subprocess.Popen(command(tmp_path / "killed"), env=environment)
    while not list((tmp_path / "killed" / "work").rglob("checkpoint-24/manifest.json")):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(command(tmp_path / "killed"), check=True, env=environment)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_jobs_share_the_cells(tmp_path: Path) -> None:
    words = [str(word) for word in arguments(tmp_path, "patterns")]
    words[words.index("--jobs") + 1] = "2"
    subprocess.run([sys.executable, "-m", "mabert_cli", *words], check=True)
    assert (tmp_path / "results" / "tiny" / "comparisons" / "MaBERT--TTTTTTTTTTTT" / "acceptability.json").exists()
    assert "cells asked for" in (tmp_path / "work" / "tiny" / "helper-1.log").read_text()
