import io
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl

from mabert.training.callbacks import (
    JsonLines,
    StepLog,
    StepRecord,
    StopOnSignal,
    TokenisingProgress,
    TrainingInterruptedError,
    TrainingProgress,
    read_lines,
)

ARGS = SimpleNamespace(device=torch.device("cpu"))


def record(step, **changes):
    values = {"step": step, "stage": 0, "loss": 4.5, "learning_rate": 0.1, "tokens": 100, "seconds": 2.0}
    return StepRecord(**values | {"data_wait": 0.01} | changes)


def progress(console=None, **changes):
    choices = {"first_step": 0, "steps": 10, "tokens_left": 1000, "every": 5}
    return TrainingProgress(console or Console(file=io.StringIO()), **choices | changes)


def test_lines_are_on_the_way_to_the_disk_at_once(tmp_path):
    with JsonLines(tmp_path / "log.jsonl", last_step=0) as lines:
        lines.append({"step": 1, "loss": 0.1})
        assert read_lines(tmp_path / "log.jsonl") == [{"step": 1, "loss": 0.1}]


def test_a_run_that_goes_on_drops_what_it_will_write_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with JsonLines(path, last_step=2) as lines:
        lines.append({"step": 3, "new": True})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]


def test_half_a_line_is_dropped_even_if_the_step_would_count(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with JsonLines(path, last_step=2):
        pass
    assert path.read_text() == '{"step": 1}\n'


def take_step(log, losses, step=1):
    log.begin(stage=1, tokens=64)
    log.data_arrived()
    for loss in losses:
        log.add_loss(torch.tensor(loss))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
    log.on_pre_optimizer_step(ARGS, None, TrainerControl(), optimizer=optimizer)
    log.on_step_end(ARGS, SimpleNamespace(global_step=step), TrainerControl())


def test_a_steps_line_adds_up_its_micro_batches(tmp_path):
    with JsonLines(tmp_path / "log.jsonl", last_step=0) as lines:
        log = StepLog(lines, progress())
        take_step(log, [1.5, 0.75])
        take_step(log, [0.5], step=2)
    first, second = (StepRecord(**line) for line in read_lines(tmp_path / "log.jsonl"))
    assert (first.step, first.stage, first.loss, first.learning_rate, first.tokens) == (1, 1, 2.25, 0.25, 64)
    assert second.loss == 0.5
    assert first.seconds > 0
    assert 0 <= first.data_wait < 1
    assert first.tokens_per_second == 64 / first.seconds


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(loss):
    with pytest.raises(FloatingPointError, match=f"the loss is {loss} at step 7. Lower learning_rate"):
        take_step(StepLog(None, progress()), [1.0, loss], step=7)


def test_without_a_terminal_progress_is_a_line_every_few_steps():
    console = Console(file=io.StringIO())
    with progress(console) as shown:
        for step in range(1, 11):
            shown.show(record(step, stage=int(step > 8)))
    lines = console.file.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 5 of 10", "step 10 of 10"]
    assert "stage 1, loss 4.5000, 50 tokens/s, 0:00:0" in lines[0]
    assert "stage 2" in lines[1]
    assert lines[1].endswith("0:00:00 left")


def test_on_a_terminal_progress_is_one_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress(console) as shown:
        for step in range(1, 11):
            shown.show(record(step))
        shown.note("held-out loss 3.2")
    text = console.file.getvalue()
    assert "10/10" in text
    assert "loss 4.5000" in text
    assert "held-out loss 3.2" in text
    assert "step 5 of 10" not in text


def test_the_time_left_counts_tokens(monkeypatch):
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr("mabert.training.callbacks.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = Console(file=io.StringIO())
    shown = progress(console, tokens_left=1100, every=1)
    with shown:
        shown.show(record(1))  # 100 of 1100 tokens in 10 seconds
    assert "0:01:40 left" in console.file.getvalue()


def stop_asked(event, *, signum=None):
    stop, control = StopOnSignal(), TrainerControl()
    with stop:
        if signum:
            signal.raise_signal(signum)
        getattr(stop, event)(ARGS, None, control)
    return control.should_training_stop, control.should_save


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops(signum):
    assert stop_asked("on_step_end") == (False, False)
    assert stop_asked("on_step_end", signum=signum) == (True, True)
    assert stop_asked("on_evaluate", signum=signum) == (True, True)
    assert stop_asked("on_save", signum=signum) == (True, False)


@pytest.fixture
def python_handles_ctrl_c():
    """A process started in the background of a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_acts_at_once_and_handlers_are_put_back(python_handles_ctrl_c):
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def enter():
        with StopOnSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_the_message_says_how_to_go_on(tmp_path):
    error = TrainingInterruptedError(signal.SIGTERM, 1200, tmp_path / "checkpoint-1200")
    assert "Stopped by SIGTERM after step 1,200." in str(error)
    assert f"{tmp_path / 'checkpoint-1200'} holds the run" in str(error)
    assert "Start it again with the same choices to go on." in str(error)


@pytest.mark.parametrize(("seconds", "lines"), [(0, 2), (3600, 0)])
def test_tokenising_says_how_far_it_is_without_a_terminal(monkeypatch, seconds, lines):
    monkeypatch.setattr("mabert.training.callbacks.SECONDS_BETWEEN_LINES", seconds)
    said = io.StringIO()
    with TokenisingProgress(Console(file=said)) as report:
        report(0.5, 1000, 20000)
        report(None, 2000, 40000)
    assert (
        said.getvalue().splitlines()
        == [
            "tokenising: 1,000 documents, 20,000 tokens, 50% read",
            "tokenising: 2,000 documents, 40,000 tokens",
        ][:lines]
    )
