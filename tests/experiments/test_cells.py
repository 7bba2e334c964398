"""Cells: computed once, resumed, shared among processes, stopped in time."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mabert.experiments import cells
from mabert.experiments import stamp as stamps
from mabert.experiments.cells import Cell, CellsFailedError, CellStore, ExperimentStoppedError, matching, run_cells

QUIET = Console(quiet=True)


@pytest.fixture
def store(tmp_path):
    return CellStore(tmp_path / "results", tmp_path / "work")


class Counter:
    """Makes cells that write down in which order they ran."""

    def __init__(self):
        self.ran = []

    def cell(self, name, result=None, config=None, **kwargs):
        def run():
            self.ran.append(name)
            if (artifact := kwargs.get("artifact")) is not None:
                artifact.parent.mkdir(parents=True, exist_ok=True)
                artifact.write_text("made")
            return result or {"value": 1}

        return Cell(name, {} if config is None else config, run, **kwargs)


def test_a_result_is_kept_with_all_that_it_comes_from(store):
    cell = Counter().cell("kind/name", {"value": 2.5}, {"steps": 3, "folder": Path("x")})
    run_cells([cell], store, console=QUIET)
    content = json.loads((store.results / "kind" / "name.json").read_text())
    assert content["cell"] == "kind/name"
    assert content["config"] == {"steps": 3, "folder": "x"}
    assert content["result"] == store.read(cell) == {"value": 2.5}
    assert content["stamp"].keys() == {"date", "commit", "uncommitted_changes", "hardware", "versions"}


@pytest.mark.skipif(shutil.which("git") is None, reason="runs git")
def test_a_package_that_is_installed_in_a_repository_does_not_bear_its_commit(tmp_path, monkeypatch):
    """Only the repository that holds the source itself names it."""
    monkeypatch.delenv("MABERT_COMMIT", raising=False)
    module = tmp_path / "venv" / "stamp.py"
    module.parent.mkdir()
    module.write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]

    def run(*words):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)

    run("init")
    (tmp_path / "other.txt").write_text("")
    run("add", "other.txt")
    run("commit", "-m", "theirs")
    monkeypatch.setattr(stamps, "SOURCES", module.parent)
    monkeypatch.setattr(stamps, "__file__", str(module))
    assert (stamps.stamp()["commit"], stamps.stamp()["uncommitted_changes"]) == (None, False)
    run("add", "venv")
    run("commit", "-m", "ours")
    assert len(stamps.stamp()["commit"]) == 40


def test_what_is_finished_is_not_computed_again(store):
    counter = Counter()
    run_cells([counter.cell("a"), counter.cell("b")], store, console=QUIET)
    run_cells([counter.cell("a"), counter.cell("b"), counter.cell("c")], store, console=QUIET)
    assert counter.ran == ["a", "b", "c"]


@pytest.mark.parametrize("again", ["same", "other"])
def test_an_artifact_that_comes_out_otherwise_is_noticed(store, tmp_path, caplog, again):
    artifact = tmp_path / "model" / "weights"

    def base(weights):
        return Counter().cell("base", {"weights": weights}, artifact=artifact)

    run_cells([base("same")], store, console=QUIET)
    artifact.unlink()
    run_cells([Counter().cell("user", needs=(base(again),))], store, console=QUIET)
    assert ("base was trained again and has other weights" in caplog.text) == (again == "other")
    assert store.read(base("same")) == {"weights": "same"}


def test_a_result_of_other_choices_is_refused(store):
    counter = Counter()
    run_cells([counter.cell("a", config={"steps": 3, "seed": 0})], store, console=QUIET)
    with pytest.raises(ValueError, match=r"a\.json was made with other choices: steps was 3, is now 4"):
        run_cells([counter.cell("a", config={"steps": 4, "seed": 0})], store, console=QUIET)


def test_what_a_cell_needs_is_made_first_and_again_where_it_is_gone(store, tmp_path):
    counter = Counter()
    base = counter.cell("base", artifact=tmp_path / "model" / "weights")
    first, second = (counter.cell(name, needs=(base,)) for name in ("first", "second"))
    run_cells([first], store, console=QUIET)
    assert counter.ran == ["base", "first"]
    before = store.path(base).read_text()
    (tmp_path / "model" / "weights").unlink()
    run_cells([first], store, console=QUIET)  # nobody needs the weights
    assert counter.ran == ["base", "first"]
    run_cells([first, second], store, console=QUIET)
    assert counter.ran == ["base", "first", "base", "second"]
    assert store.path(base).read_text() == before  # the result that others saw stays


def test_a_cell_that_fails_leaves_nothing_and_says_why(store):
    def run():
        raise FloatingPointError("the loss is nan")

    counter, bad = Counter(), Cell("a", {}, run)
    cells = [bad, counter.cell("needs a", needs=(bad,)), counter.cell("b")]
    with pytest.raises(CellsFailedError, match=r"1 cells failed, .* a: FloatingPointError: the loss is nan"):
        run_cells(cells, store, console=QUIET)
    assert not store.path(bad).exists()
    assert counter.ran == ["b"]  # what does not need it is computed all the same


def test_a_number_that_is_none_is_refused(store):
    with pytest.raises(CellsFailedError, match="not JSON compliant"):
        run_cells([Counter().cell("a", {"loss": float("nan")})], store, console=QUIET)
    assert not list(store.results.rglob("*.json"))


def test_timing_comes_last_and_not_in_a_helper(store):
    counter = Counter()
    cells = [counter.cell("timing", alone=True), counter.cell("a"), counter.cell("b")]
    run_cells(cells, store, include_alone=False, console=QUIET)
    assert counter.ran == ["a", "b"]
    run_cells(cells, store, console=QUIET)
    assert counter.ran == ["a", "b", "timing"]


@pytest.mark.parametrize(
    ("only", "matched"),
    [
        (["bert/"], ["x/bert/1", "x/bert/2"]),
        (["*/1"], ["x/bert/1", "y/bert~1/1"]),
        (["tuning/"], []),
        (["y/"], ["y/bert~1/1"]),
        (["y/", "*/2"], ["x/bert/2", "y/bert~1/1", "finetuning/2"]),
        (["y/", "tuning/"], []),
        ([], ["x/bert/1", "x/bert/2", "y/bert~1/1", "finetuning/2"]),
    ],
)
def test_only_takes_texts_at_the_beginning_of_a_part_and_patterns(only, matched):
    names = ("x/bert/1", "x/bert/2", "y/bert~1/1", "finetuning/2")
    cells = [Counter().cell(name) for name in names]
    if matched:
        assert [cell.name for cell in matching(cells, only)] == matched
    else:
        with pytest.raises(ValueError, match="no cell matches"):
            matching(cells, only)


def test_an_only_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match="no cell matches 'BRET'; there are x/bert"):
        matching([Counter().cell("x/bert")], ["BRET"])


def test_files_deleted_meanwhile_are_counted(store):
    counter, output = Counter(), io.StringIO()
    finished = [counter.cell(f"x/{n}") for n in (1, 2)]
    run_cells(finished, store, console=QUIET)

    def delete():
        for cell in finished:
            store.path(cell).unlink()
        return {}

    run_cells([*finished, Cell("x/3", {}, delete)], store, console=Console(file=output, width=80))
    told = [line.partition("]")[0] for line in output.getvalue().splitlines() if line.startswith("[")]
    assert told == ["[1 of 1", "[1 of 2", "[2 of 2"]


def test_the_end_of_the_time_stops_within_a_cell_and_leaves_the_rest(store):
    counter = Counter()
    slow = Cell("slow", {}, lambda: time.sleep(30) or {})
    handlers = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ExperimentStoppedError, match=r"the time is up.*the same command goes on") as stopped:
        run_cells([counter.cell("a"), slow, counter.cell("b")], store, max_minutes=0.3 / 60, console=QUIET)
    assert stopped.value.signum is None
    assert signal.getsignal(signal.SIGTERM) is handlers
    assert counter.ran == ["a"]
    assert store.is_finished(counter.cell("a"))


def test_what_a_cell_left_behind_goes_once_its_result_is_kept(store, tmp_path):
    scratch = tmp_path / "scratch"

    def run():
        (scratch / "model").mkdir()
        assert not store.path(cell).exists()
        return {}

    cell = Cell("a", {}, run, scratch=scratch)
    run_cells([cell], store, console=QUIET)
    assert not scratch.exists()


def test_what_it_left_behind_goes_also_when_only_its_artifact_was_missing(store, tmp_path):
    artifact, scratch = tmp_path / "artifact", tmp_path / "scratch"

    def run():
        (scratch / "model").mkdir()
        artifact.touch()
        return {}

    cell = Cell("a", {}, run, artifact=artifact, scratch=scratch)
    after = Cell("b", {}, dict, needs=(cell,))
    run_cells([cell], store, console=QUIET)
    artifact.unlink()
    run_cells([after], store, console=QUIET)
    assert artifact.exists()
    assert not scratch.exists()


@pytest.mark.parametrize("changed", ["nothing", "choices", "weights"])
def test_a_cell_goes_on_from_what_it_left_itself_only(store, tmp_path, changed):
    """A run that was stopped has left a checkpoint; then the choices or the model that it starts from are others."""
    scratch, weights = tmp_path / "scratch", tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("trained")
    base = Cell("base", {}, dict, artifact=weights.parent / "config.json")
    base.artifact.touch()
    found = []

    def run():
        found.append((scratch / "checkpoint").exists())
        (scratch / "checkpoint").touch()
        raise KeyboardInterrupt

    def cell(steps):
        return Cell("a", {"steps": steps}, run, needs=(base,), scratch=scratch)

    run_cells([base], store, console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        run_cells([cell(3)], store, console=QUIET)
    if changed == "weights":
        weights.write_text("trained again")
    with pytest.raises(KeyboardInterrupt):
        run_cells([cell(4 if changed == "choices" else 3)], store, console=QUIET)
    assert found == [False, changed == "nothing"]


def test_the_time_ends_a_run_whose_training_finished_in_the_last_moment(store):
    """A training takes the signal for its own, and with its last step done it is not stopped."""

    def run():
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        time.sleep(0.5)
        signal.signal(signal.SIGTERM, handler)
        return {}

    counter = Counter()
    with pytest.raises(ExperimentStoppedError, match="the time is up"):
        run_cells([Cell("a", {}, run), counter.cell("b")], store, max_minutes=0.2 / 60, console=QUIET)
    assert store.path(Cell("a", {}, run)).exists()
    assert counter.ran == []


def test_results_come_from_the_code_of_the_start(store, monkeypatch):
    commits = iter(["started with", "committed meanwhile"])
    monkeypatch.setattr(cells, "stamp", lambda: {"commit": next(commits)})
    counter = Counter()
    run_cells([counter.cell("a"), counter.cell("b")], store, console=QUIET)
    kept = [json.loads((store.results / f"{name}.json").read_text())["stamp"]["commit"] for name in "ab"]
    assert kept == ["started with"] * 2


def test_a_helper_ends_with_the_process_that_started_it(store, monkeypatch):
    counter, parents = Counter(), iter([7, 7, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    run_cells([counter.cell(name) for name in "abc"], store, include_alone=False, console=QUIET)
    assert counter.ran == ["a"]


def test_a_signal_stops_and_is_told(store):
    cell = Cell("a", {}, lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5) or {})
    with pytest.raises(ExperimentStoppedError, match="SIGINT") as stopped:
        run_cells([cell], store, console=QUIET)
    assert stopped.value.signum == signal.SIGINT


WORKER = """
import sys, time
from pathlib import Path
from rich.console import Console
from mabert.experiments.cells import Cell, CellStore, run_cells

folder, name, others = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
(folder / name).touch()
while not all((folder / other).exists() for other in others):
    time.sleep(0.02)

def made(cell, seconds):
    def run():
        with (folder / "ran.txt").open("a") as file:
            file.write(f"{cell} {name}\\n")
        time.sleep(seconds)
        return {"by": name}
    return run

base = Cell("base", {}, made("base", 0.5), artifact=folder / "ran.txt")
cells = [Cell(f"cell-{n}", {}, made(f"cell-{n}", 0.8), needs=(base,)) for n in range(6)]
run_cells(cells, CellStore(folder / "results", folder / "work"), console=Console(quiet=True))
"""


def test_two_processes_share_the_cells_and_repeat_none(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), name, *"AB"], stderr=subprocess.PIPE)
        for name in "AB"
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    lines = (tmp_path / "ran.txt").read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(["base", *(f"cell-{n}" for n in range(6))])
    assert {line.split()[1] for line in lines} == {"A", "B"}


def test_the_cell_of_a_killed_process_is_free_again(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), "A"])
    while not (tmp_path / "ran.txt").exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    subprocess.run([sys.executable, "-c", WORKER, str(tmp_path), "B"], check=True, timeout=60)
    assert len(list((tmp_path / "results").glob("cell-*.json"))) == 6
