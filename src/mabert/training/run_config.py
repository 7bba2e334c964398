"""What the choices of every run have in common: they are saved beside its results, and a run goes on with the same."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import CONFIG_NAME

from mabert.files import atomic_write, digest

TOKENIZER = "tokenizer.json"
READS = "reads"
"""In a run's file: its `reads`, each with a digest."""


class RunConfig:
    """Base of the frozen dataclasses that hold a run's choices."""

    file_name: ClassVar[str]
    """Of the file in the run's folder that holds them."""
    may_change_on_resume: ClassVar[frozenset[str]]
    """Fields that change neither the data nor the mathematics of a run."""

    output: Path
    seed: int
    max_grad_norm: float
    bf16: bool
    checkpoint_every: int

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files that the run begins with, beside those that look after themselves: with other content it is another
        run."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return json.loads(json.dumps(values, default=str))

    def save(self, folder: Path) -> None:
        """Write the fields to `file_name` in `folder`, with what the files that are read contain."""
        with atomic_write(folder / self.file_name, "w") as file:
            json.dump(self.to_dict() | {READS: _contents(self.reads)}, file, indent=2)
            file.write("\n")

    def check_resumes(self, folder: Path) -> None:
        """Raise ValueError, naming the fields or files, if the run in `folder` was begun with other choices than these,
        or what it reads has changed since."""
        saved = json.loads((folder / self.file_name).read_text(encoding="utf-8"))
        read, now_read = saved.pop(READS, {}), _contents(self.reads)
        # a choice that did not exist then was made as it is by default now
        saved = {field.name: field.default for field in fields(self) if field.default is not MISSING} | saved  # type: ignore[arg-type]
        saved = json.loads(json.dumps(saved, default=str))
        before, now = _flat(saved), _flat(self.to_dict())
        changed = [
            f"{name} was {before.get(name)!r}, is now {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name not in self.may_change_on_resume
        ]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other choices: {'; '.join(changed)}. "
                "Take the old values to go on with it, or another output folder for a new run."
            )
        if others := [path for path in read.keys() & now_read.keys() if read[path] != now_read[path]]:
            raise ValueError(
                f"{folder} holds a run that began with other content of {', '.join(sorted(others))}. "
                "Put it back to go on with the run, or take another output folder for a new one."
            )


def model_files(folder: Path) -> tuple[Path, ...]:
    """Those files of a model folder that its outputs depend on."""
    names = (CONFIG_NAME, TOKENIZER)
    return tuple(
        path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin") or path.name in names
    )


def _contents(paths: Iterable[Path]) -> dict[str, str]:
    return {str(path): digest(path) for path in paths if path.is_file()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lift the fields of a field, as the model's, to the top level as `model.<name>`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
