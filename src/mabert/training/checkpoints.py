"""Checkpoints that are either complete or not there, and a resume that can tell."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_model
from torch import nn
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from mabert.files import atomic_folder

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which `checkpoint` was written."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>.")
    return int(match[1])


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in `output`, complete or not, oldest first."""
    folders = (entry for entry in output.iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))
    return sorted(folders, key=checkpoint_step)


def latest_complete_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all there in full, and why each newer one was skipped."""
    skipped: list[str] = []
    for checkpoint in reversed(list_checkpoints(output) if output.is_dir() else []):
        if (defect := _defect(checkpoint)) is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} skipped: {defect}")
    return None, skipped


def _defect(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    return None


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2), encoding="utf-8")


class AtomicCheckpointTrainer(Trainer):
    """A Trainer whose `checkpoint-<step>` folders appear complete, under their name, or not at all.

    Transformers' own writes into the final folder, and resumes from one that was left half-written. Here all files go
    to a temporary folder beside it, are fsynced with a manifest of their sizes, and the folder is renamed; only then
    are the older ones deleted, down to `args.save_total_limit`. Works under several processes with one file system.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        target = output / f"checkpoint-{self.state.global_step}"
        with _told_how_to_go_on(output), self._shared_atomic_folder(target) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self.state.save_to_json(str(folder / STATE_FILE))
        if self.args.should_save and self.args.save_total_limit:
            # What the resume skipped as incomplete can bear a higher number, and must not count as newer.
            written = [path for path in list_checkpoints(output) if checkpoint_step(path) <= self.state.global_step]
            for outdated in written[: -self.args.save_total_limit]:
                shutil.rmtree(outdated)

    @contextmanager
    def _shared_atomic_folder(self, path: Path) -> Iterator[Path]:
        """`atomic_folder` for all processes at once: the first one makes it, and renames it when all have written."""
        if not self.args.should_save:
            yield self._first_process_says(None)
            self.accelerator.wait_for_everyone()
            return
        # A folder of that name can only be one that the resume skipped as incomplete.
        with atomic_folder(path, replace=True) as folder, _torch_errors_as_full_disk():
            yield self._first_process_says(folder)
            self.accelerator.wait_for_everyone()
            _write_manifest(folder)

    def _first_process_says(self, folder: Path | None) -> Path:
        said = [folder]
        if self.args.world_size > 1:
            dist.broadcast_object_list(said, src=0)
        assert said[0] is not None
        return said[0]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Transformers' own loads with strict=False and warns of each tied weight.
        load_model(model or self.model_wrapped, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)


@contextmanager
def _torch_errors_as_full_disk() -> Iterator[None]:
    """Give `torch.save`'s failure to write, an anonymous RuntimeError from its zip writer, the name of its cause."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "no space left on the device") from error


@contextmanager
def _told_how_to_go_on(output: Path) -> Iterator[None]:
    """Add to the message of a full disk what is left to go on from."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        latest, _ = latest_complete_checkpoint(output)
        left = f"{latest} is complete, the run goes on from there" if latest else "no earlier checkpoint exists"
        raise OSError(error.errno, f"{error.strerror} ({left})") from error
