"""An experiment is a list of cells: each is computed once, leaves one JSON file, and is never computed again.

Several processes may be given the same cells: each takes those that no other one is at. What a cell needs from another
one (a pretrained checkpoint) is made first.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from mabert.experiments.stamp import stamp
from mabert.files import atomic_write, digest, lock
from mabert.training.callbacks import TrainingInterruptedError, say
from mabert.training.run_config import model_files

WAIT_SECONDS = 2.0
TIME_IS_UP = "the time is up"
MACHINE = ("hardware", "threads")
"""In the config of a cell that measures time: where it did."""
BEGUN = "cell.json"
"""In a cell's scratch folder: what it was begun with."""
WEIGHTS = "weights"
"""In a result: digest of the weights of the model that it is about."""

logger = logging.getLogger(__name__)


class ExperimentStoppedError(BaseException):
    """The time was up, or a signal came; what is finished is kept, and the same command goes on from there.

    As KeyboardInterrupt, it passes whatever catches errors.
    """

    def __init__(self, why: str, signum: int | None = None) -> None:
        super().__init__(f"Stopped: {why}. What is finished is kept; the same command goes on from there.")
        self.signum = signum


class CellsFailedError(RuntimeError):
    """Some cells failed; all that do not need them were computed."""

    def __init__(self, failed: dict[str, Exception]) -> None:
        reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
        super().__init__(f"{len(failed)} cells failed, and those that need them were left out. {reasons}")


@dataclass(frozen=True)
class Cell:
    """One number or a few, and how they come about. Cells of one name are one cell."""

    name: str
    """Path of its file under the results folder, without `.json`."""
    config: dict[str, Any] = field(compare=False)
    """Every choice that the result depends on, as JSON values."""
    run: Callable[[], dict[str, Any]] = field(compare=False)
    """Computes the result, as JSON values."""
    needs: tuple["Cell", ...] = field(default=(), compare=False)
    """Cells whose results or artifacts `run` reads."""
    artifact: Path | None = field(default=None, compare=False)
    """The last file that `run` leaves for other cells; where it is missing, the cell is run again for them."""
    scratch: Path | None = field(default=None, compare=False)
    """Folder that nobody needs once the result is kept."""
    alone: bool = field(default=False, compare=False)
    """It measures time: nothing else may run beside it."""


@dataclass(frozen=True)
class CellStore:
    """Where results are kept, `results/`, and where locks and checkpoints are, `work/`."""

    results: Path
    work: Path

    def path(self, cell: Cell) -> Path:
        """The cell's file."""
        return self.results / f"{cell.name}.json"

    def is_finished(self, cell: Cell) -> bool:
        """Whether its result is there.

        Raises:
            ValueError: it is there, but was made with other choices.
        """
        path = self.path(cell)
        if not path.exists():
            return False
        before, now = json.loads(path.read_text(encoding="utf-8"))["config"], _plain(cell.config)
        changed = [
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{path} was made with other choices: {'; '.join(changed)}. "
                "Take the old ones, or name other folders for both: --results and --work."
            )
        return True

    def machine(self, cell: Cell) -> dict[str, Any]:
        """What of a cell's choices is the machine's, as it was when it was measured; empty where it was not."""
        path = self.path(cell)
        config = json.loads(path.read_text(encoding="utf-8"))["config"] if path.exists() else {}
        return {name: config[name] for name in MACHINE if name in config}

    def is_ready_for_others(self, cell: Cell) -> bool:
        """Whether cells that need this one can run."""
        return self.is_finished(cell) and (cell.artifact is None or cell.artifact.exists())

    def read(self, cell: Cell) -> dict[str, Any]:
        """The result of a finished cell."""
        return json.loads(self.path(cell).read_text(encoding="utf-8"))["result"]

    def run(self, cell: Cell, origin: dict[str, Any]) -> None:
        """Compute a cell and keep its result with all that it comes from, of which `origin` is the stamp."""
        if cell.scratch is not None:
            self._begin(cell, cell.scratch)
        result = cell.run()
        self._keep(cell, result, origin)
        if cell.scratch is not None:
            shutil.rmtree(cell.scratch, ignore_errors=True)

    def _begin(self, cell: Cell, scratch: Path) -> None:
        """Keep what an earlier try of this cell left in its folder, nothing of one with other choices or weights."""
        path = scratch / BEGUN
        weights = {
            need.name: {file.name: digest(file) for file in model_files(need.artifact.parent)}
            for need in cell.needs
            if need.artifact is not None
        }
        now = json.dumps({"config": _plain(cell.config), "weights": weights})
        if scratch.exists() and not (path.exists() and path.read_text(encoding="utf-8") == now):
            logger.warning("%s begins anew: %s was left by other choices, or another model", cell.name, scratch)
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            file.write(now)

    def _keep(self, cell: Cell, result: dict[str, Any], origin: dict[str, Any]) -> None:
        if self.is_finished(cell):  # only its artifact was missing; the result that others saw stays
            if self.read(cell).get(WEIGHTS) != result.get(WEIGHTS):
                logger.warning(
                    "%s was trained again and has other weights than before: what is computed from them now stands "
                    "beside earlier results of the old ones. Delete the files of its cells to make all of them anew.",
                    cell.name,
                )
            return
        content = {
            "cell": cell.name,
            "config": _plain(cell.config),
            "result": result,
            "stamp": origin,
        }
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")

    @contextlib.contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Give True and hold the cell for this process, or give False where another one has it.

        Of the cells that measure time only one is held at a time.
        """
        path = self.work / "locks" / ("alone" if cell.alone else cell.name.replace("/", "--"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path) as file:
            yield file is not None


def matching(cells: Sequence[Cell], only: Collection[str]) -> list[Cell]:
    """The cells with a part of whose name (parts are between slashes) one of these texts begins, or that match it as a
    pattern with `*`; all of them where there is no text.

    Raises:
        ValueError: nothing is named like one of the texts.
    """
    for text in only:
        if not any(_matches(cell.name, text) for cell in cells):
            raise ValueError(f"no cell matches {text!r}; there are {', '.join(cell.name for cell in cells[:8])}, …")
    return [cell for cell in cells if not only or any(_matches(cell.name, text) for text in only)]


def run_cells(
    cells: Sequence[Cell],
    store: CellStore,
    *,
    max_minutes: float | None = None,
    include_alone: bool = True,
    console: Console | None = None,
) -> None:
    """Compute every cell that is not there yet, and what it needs.

    Args:
        max_minutes: stop after that long, also within a cell; what writes checkpoints goes on from there the next time.
        include_alone: also those that measure time; a helper process leaves them to the first one, and ends with it.

    Raises:
        ValueError: a result was made with other choices.
        CellsFailedError: some cells failed; the others are there.
        ExperimentStoppedError: the time is up, or Ctrl-C or SIGTERM came.
    """
    console = console or Console(stderr=True)
    failed: dict[str, Exception] = {}
    pending = _pending(cells, store, failed)
    total, done, seconds = len(pending), 0, 0.0
    origin, parent = stamp(), os.getppid()  # the code that runs is that of now, whatever is committed meanwhile
    say(console, f"{len(cells)} cells asked for; to compute, with what they need: {total}")
    with _stopping(max_minutes) as is_up:
        while pending:
            if not include_alone and (pending[0].alone or os.getppid() != parent):
                return
            if is_up.is_set():  # in the last moments of a training, which finishes then
                raise ExperimentStoppedError(TIME_IS_UP)
            began = time.monotonic()
            for cell in _ready(pending, store):
                with store.claim(cell) as mine:
                    if mine and cell in _pending(cells, store, failed):
                        total = max(total, len(pending))  # more, where files were deleted meanwhile
                        say(console, f"[{total - len(pending) + 1} of {total}] {cell.name}")
                        try:
                            store.run(cell, origin)
                        except TrainingInterruptedError:
                            raise
                        except Exception as error:
                            logger.exception("%s failed", cell.name)
                            failed[cell.name] = error
                        break
            else:
                time.sleep(WAIT_SECONDS)  # others are at all that could begin now
                pending = _pending(cells, store, failed)
                continue
            done, seconds = done + 1, seconds + time.monotonic() - began
            if pending := _pending(cells, store, failed):
                left = timedelta(seconds=round(seconds / done * len(pending)))
                say(console, f"{len(pending)} cells left, about {left} if they take as long as those before")
    if failed:
        raise CellsFailedError(failed)


def _pending(wanted: Sequence[Cell], store: CellStore, failed: Collection[str]) -> list[Cell]:
    """What has to be computed, each cell after what it needs; without those that failed or need one that did."""
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> bool:
        if cell.name in failed:
            return False
        if cell.name not in found and all(store.is_ready_for_others(need) or add(need) for need in cell.needs):
            found[cell.name] = cell
        return cell.name in found

    for cell in wanted:
        if not store.is_finished(cell):
            add(cell)
    return sorted(found.values(), key=lambda cell: cell.alone)


def _ready(pending: Sequence[Cell], store: CellStore) -> Iterator[Cell]:
    """The cells that could begin now; those that must be alone wait for all others."""
    for cell in pending:
        if cell.alone and not pending[0].alone:
            return
        if all(store.is_ready_for_others(need) for need in cell.needs):
            yield cell


def _matches(name: str, only: str) -> bool:
    """Whether a pattern fits, or a text stands in the name from the beginning of one of its parts."""
    return fnmatchcase(name, only) if "*" in only else f"/{only}" in f"/{name}"


@contextlib.contextmanager
def _stopping(max_minutes: float | None) -> Iterator[threading.Event]:
    """Turn SIGINT, SIGTERM and the end of the time into `ExperimentStoppedError`.

    While a model trains, its own handler is in place, which saves a checkpoint first; the timer sends a SIGTERM that
    either of the two obeys. Gives the event that the time is up.
    """
    is_up = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield is_up
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        why = TIME_IS_UP if is_up.is_set() else signal.Signals(signum).name
        raise ExperimentStoppedError(why, None if is_up.is_set() else signum)

    def time_is_up() -> None:
        is_up.set()
        os.kill(os.getpid(), signal.SIGTERM)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    timer = threading.Timer(60 * max_minutes, time_is_up) if max_minutes is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield is_up
    except TrainingInterruptedError as error:
        if is_up.is_set():
            raise ExperimentStoppedError(TIME_IS_UP) from error
        raise
    finally:
        if timer:
            timer.cancel()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config, default=str))
