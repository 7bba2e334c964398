"""The rows of a fine-tuning run: read, held out, tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from mabert.data.glue import glue_task, load_glue, subset_label
from mabert.data.tables import Table, TableError, read_table
from mabert.inference.batches import Features, tokenize
from mabert.training.finetune_config import FinetuneConfig
from mabert.training.metrics import compute_metrics

# CHOICE: which rows are held out or left out does not depend on the run's seed, so that runs with other seeds compare
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Rows ready for the model."""

    features: list[Features]
    labels: np.ndarray
    """(n,) int64 classes, or float32 numbers."""
    subset: str
    """What has to stand beside its scores, which do not compare with published ones then: "(subset, n rows)" if it is
    not the whole official split, "(train subset, n rows)" if train was not, "(held out of train, n rows)" if it is
    a part of train; else empty."""
    truncated: int
    """Rows that were cut to the longest sequence."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        """The row for a key (stage, epoch, index) of `StagedBatchSampler`, with its label."""
        return self.features[key[-1]] | {"labels": self.labels[key[-1]]}


@dataclass(frozen=True)
class FinetuneData:
    """What a run trains on, selects by and is evaluated on."""

    train: Split
    selection: Split | None
    """Held out of train to select an epoch by, where one is selected."""
    evaluation: dict[str, Split]
    label_names: tuple[str, ...]
    """One class each; for regression the name of the number."""
    regression: bool
    metrics: tuple[str, ...]
    """Names; the main one first."""


def load_data(config: FinetuneConfig, tokenizer: PreTrainedTokenizerFast, max_length: int) -> FinetuneData:
    """Read, hold out and tokenise everything that a run needs.

    Raises:
        ValueError: a file cannot be used, train has a single label, or a set cannot be scored by the task's metrics.
    """
    tables, metrics = _read_task(config) if config.task else _read_tables(config)
    train = tables.pop("train")
    if train.label_names is not None and len(set(train.labels or ())) < 2:
        raise TableError(f"{train.path}: every row has the same label; a classifier needs two of them at least")
    if config.holds_dev_out:
        train, tables["dev"] = _hold_out(train, config.dev_fraction, "dev_fraction")
    selection = None
    if config.select == "best":
        train, selection = _hold_out(train, config.select_fraction, "select_fraction")
    if config.max_train_rows is not None:
        train = _rows(train, np.sort(_shuffled(len(train))[: config.max_train_rows]))

    def split(name: str, table: Table) -> Split:
        # what is scored at the end has to be scorable now
        labels = np.asarray(table.labels, dtype=np.float32 if config.regression else np.int64)
        if name != "train":
            try:
                compute_metrics(metrics, labels, labels)
            except ValueError as error:
                raise TableError(f"{table.path} ({name}, {len(table)} rows) cannot be scored: {error}") from error
        features, truncated = tokenize(tokenizer, table.texts, table.pairs, max_length=max_length, truncate=True)
        return Split(features, labels, _subset(config, name, len(table), len(train)), truncated)

    return FinetuneData(
        train=split("train", train),
        selection=split("selection", selection) if selection else None,
        evaluation={name: split(name, table) for name, table in sorted(tables.items())},
        label_names=train.label_names or (config.label_column,),
        regression=config.regression,
        metrics=metrics,
    )


def _subset(config: FinetuneConfig, name: str, rows: int, train_rows: int) -> str:
    if name == "dev" and config.holds_dev_out:
        return f"(held out of train, {rows} rows)"
    if config.task is None or name == "selection":
        return ""
    notes = [subset_label(config.task, name, rows)]
    if name != "train":
        notes.append(subset_label(config.task, "train", train_rows).replace("(subset", "(train subset"))
    return "; ".join(filter(None, notes)).replace("); (", "; ")


def _read_task(config: FinetuneConfig) -> tuple[dict[str, Table], tuple[str, ...]]:
    assert config.task is not None
    assert config.glue is not None
    return load_glue(config.glue, config.task, splits=config.tables), glue_task(config.task).metrics


def _read_tables(config: FinetuneConfig) -> tuple[dict[str, Table], tuple[str, ...]]:
    tables: dict[str, Table] = {}
    for name, path in config.tables.items():
        tables[name] = read_table(
            path,
            text_columns=[column for column in (config.text_column, config.text_pair_column) if column is not None],
            label_column=config.label_column,
            labels=tables["train"].label_names if tables else None,
            regression=config.regression,
        )
    return tables, ("pearson", "spearman") if config.regression else ("accuracy", "mcc")


def _hold_out(table: Table, fraction: float, field: str) -> tuple[Table, Table]:
    """Part a table at random in what stays and what is held out; both keep the order of the rows."""
    count = round(len(table) * fraction)
    if not 0 < count < len(table):
        raise TableError(f"{table.path}: {field}={fraction} of {len(table)} rows leaves none on one side")
    order = _shuffled(len(table))
    return _rows(table, np.sort(order[count:])), _rows(table, np.sort(order[:count]))


def _shuffled(count: int) -> np.ndarray:
    return np.random.default_rng(SPLIT_SEED).permutation(count)


def _rows(table: Table, rows: Sequence[int] | np.ndarray) -> Table:
    assert table.labels is not None
    return replace(
        table,
        texts=[table.texts[row] for row in rows],
        pairs=None if table.pairs is None else [table.pairs[row] for row in rows],
        labels=[table.labels[row] for row in rows],
    )
