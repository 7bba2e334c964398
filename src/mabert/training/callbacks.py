"""What happens around an optimizer step: its line in the log, progress and time left, and stopping without loss."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from mabert.files import atomic_write
from mabert.inference.batches import SECONDS_BETWEEN_LINES


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a `.jsonl` file that this package wrote; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class JsonLines:
    """A `.jsonl` file of records with a `step`, one line each, that survives the process being killed.

    Opening it for a run that goes on after `last_step` drops what lies beyond: the run will write it anew.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        kept = list(self._lines_until(path, last_step))
        with atomic_write(path, "w") as file:
            file.writelines(kept)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # each line reaches the system when it is written

    @staticmethod
    def _lines_until(path: Path, last_step: int) -> Iterator[str]:
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                # A killed process can leave half a line at the end; all up to the checkpoint's step are on the disk.
                if not line.endswith("\n") or json.loads(line)["step"] > last_step:
                    return
                yield line

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self._file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, over all processes; a line of `log.jsonl`."""

    step: int
    """Steps done, this one included."""
    stage: int
    """Of fine-tuning, the epoch; both from 0."""
    loss: float
    """Raw loss of this step's batch, in nats a label."""
    learning_rate: float
    tokens: int
    seconds: float
    """From asking for the batch to the end of the step; evaluations and checkpoints are not in it."""
    data_wait: float
    """Share of `seconds` spent waiting for the batch."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of this step."""
        return self.tokens / self.seconds


AGAINST_DIVERGENCE = (
    "Lower learning_rate, lengthen the warm-up or lower max_grad_norm; the last checkpoint is from before."
)


class StepLog(TrainerCallback):
    """Assembles each step's `StepRecord` from what the Trainer reports, writes it, and hands it on.

    Raises:
        FloatingPointError: the loss is NaN or infinite. No checkpoint is written of such a step.
    """

    def __init__(self, lines: JsonLines | None, progress: "TrainingProgress") -> None:
        self.lines = lines
        self.progress = progress
        self._stage = self._tokens = 0
        self._loss: torch.Tensor | float = 0.0
        self._learning_rate = 0.0
        self._began = self._data_arrived = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the intervals of logs, evaluations and checkpoints from the arguments: a resume puts back old ones."""
        state.compute_steps(args, state.max_steps)

    def begin(self, stage: int, tokens: int) -> None:
        """The Trainer asks for the batch of a step: `tokens` over all processes."""
        self._stage, self._tokens, self._loss = stage, tokens, 0.0
        self._began = time.perf_counter()

    def data_arrived(self) -> None:
        """The batch is there."""
        self._data_arrived = time.perf_counter()

    def add_loss(self, loss: torch.Tensor) -> None:
        """One micro-batch's share of the loss, as this process sees it."""
        self._loss = self._loss + loss

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the learning rate that this step is taken with."""
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record."""
        loss = mean_over_processes(float(self._loss), args.device)
        seconds = time.perf_counter() - self._began
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {state.global_step}. {AGAINST_DIVERGENCE}")
        record = StepRecord(
            step=state.global_step,
            stage=self._stage,
            loss=loss,
            learning_rate=self._learning_rate,
            tokens=self._tokens,
            seconds=seconds,
            data_wait=(self._data_arrived - self._began) / seconds,
        )
        if self.lines is not None:
            self.lines.append(asdict(record))
        self.progress.show(record)


def mean_over_processes(value: float, device: torch.device) -> float:
    """Average `value` over all processes, on each of them; every process has to call it."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def say(console: Console, line: str) -> None:
    """Print a line about progress as it is, in one piece."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


class TrainingProgress:
    """Progress on a terminal as one bar over all steps, elsewhere as a line every `every` steps.

    The time left counts tokens, not steps, since a step of a later stage takes longer. `part` is the word for a stage.
    """

    def __init__(
        self, console: Console, *, first_step: int, steps: int, tokens_left: int, every: int, part: str = "stage"
    ) -> None:
        self._console, self._steps, self._every, self._part = console, steps, every, part
        self._tokens_left, self._tokens_done = tokens_left, 0
        self._began = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=first_step)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, record: StepRecord) -> None:
        """Move on by one step."""
        self._tokens_left -= record.tokens
        self._tokens_done += record.tokens
        left = self._tokens_left / self._tokens_done * (time.monotonic() - self._began)
        words = (
            f"{self._part} {record.stage + 1}, loss {record.loss:.4f}, {record.tokens_per_second:,.0f} tokens/s, "
            f"{timedelta(seconds=round(left))} left"
        )
        self._bar.update(self._task, completed=record.step, description=words)
        if self._bar.disable and (record.step % self._every == 0 or record.step == self._steps):
            self.note(f"step {record.step:,} of {self._steps:,}: {words}")

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        say(self._console, message)


class TokenisingProgress:
    """Progress while a corpus is tokenised: a bar on a terminal, elsewhere a line every half minute.

    Called as `mabert.data.shards.Progress`.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._reported = console, time.monotonic()
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, fraction: float | None, documents: int, tokens: int) -> None:
        """Show how far it is; `fraction` is None where nobody can know."""
        self._bar.start()
        words = f"tokenising: {documents:,} documents, {tokens:,} tokens"
        self._bar.update(self._task, completed=fraction or 0.0, description=words)
        if self._bar.disable and (now := time.monotonic()) - self._reported >= SECONDS_BETWEEN_LINES:
            self._reported = now
            read = "" if fraction is None else f", {fraction:.0%} read"
            say(self._console, f"{words}{read}")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' own bars, which appear at every save and load."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


class TrainingInterruptedError(RuntimeError):
    """A signal stopped the run after its running step was finished and saved."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(signum).name} after step {step:,}. Nothing is lost: {checkpoint} holds the "
            "run up to there. Start it again with the same choices to go on."
        )
        self.signum, self.step, self.checkpoint = signum, step, checkpoint


class StopOnSignal(TrainerCallback):
    """Makes the first Ctrl-C or SIGTERM finish the running step, save and stop; the second one acts at once.

    Use it as a context manager around the training, and as a callback in it. The handlers found on entry are put back
    on exit. Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
        else:
            self.__exit__()
            signal.raise_signal(signum)

    def _stop_if_asked(self, args: TrainingArguments, control: TrainerControl, *, save: bool) -> None:
        # One process's signal stops all of them, at the same step.
        if mean_over_processes(float(self.received or 0), args.device) > 0:
            self.received = self.received or signal.SIGTERM
            control.should_training_stop = True
            control.should_save = control.should_save or save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step."""
        self._stop_if_asked(args, control, save=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this evaluation."""
        self._stop_if_asked(args, control, save=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this checkpoint."""
        self._stop_if_asked(args, control, save=False)
