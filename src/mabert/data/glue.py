"""The GLUE tasks of the paper, read from a folder in the official layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mabert.data.tables import Table


@dataclass(frozen=True)
class GlueTask:
    """One task: where its columns are, what its labels are, how it is scored and how large it is.

    metrics: "accuracy", "f1" or "matthews_correlation", the first of them the main one. rows: split -> rows of the official data set.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: dict[str, int]

    @property
    def dev_splits(self) -> tuple[str, ...]:
        """("dev",), or MNLI's two."""
        return tuple(split for split in self.rows if split != "train")


GLUE_TASKS: dict[str, GlueTask] = {}


def glue_task(name: str) -> GlueTask:
    """Return the task of that name, whatever its case; an unknown name fails with the nearest one."""
    raise NotImplementedError


def load_glue(folder: str | Path, task: str | GlueTask) -> dict[str, Table]:
    """Return {"train": Table, "dev": Table}; for MNLI "dev_matched" and "dev_mismatched"."""
    raise NotImplementedError


def subset_label(task: str | GlueTask, split: str, rows: int) -> str:
    """Return "" for the whole official split, else "(subset, n rows)"."""
    raise NotImplementedError
