"""The GLUE tasks of the paper, read from a folder in the official layout."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mabert.data.tables import Table, TableError, read_table


@dataclass(frozen=True)
class GlueTask:
    """One task: where its columns are, what its labels are, how it is scored and how large it is.

    name: also the folder's. metrics: names of `mabert.training.metrics`, the main one first. rows: split -> rows of
    the whole official split; the splits are also the names of the files. columns: of a file without a header.
    skip_incomplete: the official file has lines that lack fields, and everybody leaves them out.
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: Mapping[str, int]
    columns: tuple[str, ...] | None = None
    skip_incomplete: bool = False

    @property
    def dev_splits(self) -> tuple[str, ...]:
        """("dev",), or MNLI's two."""
        return tuple(split for split in self.rows if split != "train")


_ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA",
            ("sentence",),
            "label",
            ("0", "1"),
            ("mcc",),
            {"train": 8551, "dev": 1043},
            columns=("source", "label", "star", "sentence"),
        ),
        GlueTask("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",), {"train": 67349, "dev": 872}),
        GlueTask(
            "MRPC",
            ("#1 String", "#2 String"),
            "Quality",
            ("0", "1"),
            ("accuracy", "f1"),
            {"train": 3668, "dev": 408},
        ),
        GlueTask(
            "QQP",
            ("question1", "question2"),
            "is_duplicate",
            ("0", "1"),
            ("accuracy", "f1"),
            {"train": 363849, "dev": 40430},
            skip_incomplete=True,
        ),
        GlueTask(
            "MNLI",
            ("sentence1", "sentence2"),
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832},
        ),
        GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",), {"train": 104743, "dev": 5463}),
        GlueTask("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT, ("accuracy",), {"train": 2490, "dev": 277}),
    )
}
"""The paper's seven data sets; it counts MNLI's two dev sets as two of its eight scores."""


def glue_task(name: str) -> GlueTask:
    """Return the task of that name, whatever its case; an unknown name fails (ValueError) with the nearest ones."""
    by_lower = {task.name.lower(): task for task in GLUE_TASKS.values()}
    if name.lower() not in by_lower:
        nearest = difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)
        hint = " or ".join(by_lower[near].name for near in nearest) or ", ".join(GLUE_TASKS)
        raise ValueError(f"unknown GLUE task {name!r}; did you mean {hint}?")
    return by_lower[name.lower()]


def glue_paths(folder: str | Path, task: str | GlueTask, *, splits: Collection[str] | None = None) -> dict[str, Path]:
    """Where `glue_files` looks for them."""
    task = glue_task(task) if isinstance(task, str) else task
    return {split: Path(folder, task.name, f"{split}.tsv") for split in task.rows if splits is None or split in splits}


def glue_files(folder: str | Path, task: str | GlueTask, *, splits: Collection[str] | None = None) -> dict[str, Path]:
    """Return {"train": Path, "dev": Path} of ``folder/<task>/*.tsv``, or those of ``splits`` only.

    Raises TableError for a file that is missing, with the list of those expected.
    """
    task = glue_task(task) if isinstance(task, str) else task
    paths = glue_paths(folder, task, splits=splits)
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        expected = ", ".join(f"{task.name}/{split}.tsv" for split in task.rows)
        raise TableError(f"{', '.join(missing)} not found; {task.name} in the official GLUE layout is {expected}")
    return paths


def load_glue(folder: str | Path, task: str | GlueTask, *, splits: Collection[str] | None = None) -> dict[str, Table]:
    """Return {"train": Table, "dev": Table} of `glue_files`; MNLI has "dev_matched" and "dev_mismatched"."""
    task = glue_task(task) if isinstance(task, str) else task
    return {
        split: read_table(
            path,
            text_columns=task.text_columns,
            label_column=task.label_column,
            labels=task.labels,
            columns=task.columns,
            skip_incomplete=task.skip_incomplete,
        )
        for split, path in glue_files(folder, task, splits=splits).items()
    }


def subset_label(task: str | GlueTask, split: str, rows: int) -> str:
    """Return "" for a whole official split, else "(subset, n rows)": such scores do not compare with published ones."""
    task = glue_task(task) if isinstance(task, str) else task
    return "" if rows == task.rows[split] else f"(subset, {rows} rows)"
