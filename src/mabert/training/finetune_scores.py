"""Scores of a classifier on the sets of its task, after the training and, to select the best epoch, within it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from mabert.files import atomic_folder, atomic_write
from mabert.inference.batches import map_batches, progress_bar
from mabert.inference.predict import predictions_of
from mabert.training.callbacks import JsonLines, TrainingProgress
from mabert.training.finetune_data import FinetuneData, Split
from mabert.training.finetune_plan import FinetunePlan
from mabert.training.metrics import compute_metrics, majority_baseline

BEST, SCORES = "best", "scores.json"
EVALUATION_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class SplitResult:
    """The scores on one set."""

    rows: int
    subset: str
    """What to show beside the scores, see `Split.subset`."""
    truncated: int
    """Rows that were cut to `max_length` tokens."""
    metrics: dict[str, float]
    """The main one first."""
    majority: dict[str, float]
    """The metrics of always answering the most frequent class of train; empty for regression."""

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        baseline = ", ".join(f"{value:.4f}" for value in self.majority.values())
        return f"{scores} (majority class {baseline})" if baseline else scores


def split_logits(
    model: PreTrainedModel, planned: FinetunePlan, split: Split, name: str, console: Console | None
) -> np.ndarray:
    """What the model says of each row, (rows, labels) float32."""
    with progress_bar(f"evaluating {name}", len(split), console) as advance:
        return map_batches(
            model,
            planned.collate,
            split.features,
            lambda inputs: model(**inputs).logits,
            batch_tokens=EVALUATION_BATCH_TOKENS,
            padded_to=planned.config.max_length if planned.config.pad_to_max_length else 0,
            advance=advance,
        )


def score(split: Split, logits: np.ndarray, data: FinetuneData) -> SplitResult:
    """Hold the logits of a set against its labels."""
    predicted = logits[:, 0] if data.regression else logits.argmax(1)
    return SplitResult(
        rows=len(split),
        subset=split.subset,
        truncated=split.truncated,
        metrics=compute_metrics(data.metrics, split.labels, predicted),
        majority={} if data.regression else majority_baseline(data.metrics, data.train.labels, split.labels),
    )


def write_predictions(path: Path, split: Split, logits: np.ndarray, data: FinetuneData) -> None:
    """index, gold and predicted label, and a column of probabilities for each label; for regression two numbers."""
    predictions = predictions_of(logits, data.label_names)
    with atomic_write(path, "w") as file:
        columns = ["index", "gold", "predicted"]
        if not data.regression:
            columns += [f"p({label})" for label in data.label_names]
        file.write("\t".join(columns) + "\n")
        for index, (gold, item) in enumerate(zip(split.labels.tolist(), predictions, strict=True)):
            true = gold if data.regression else data.label_names[gold]
            values = [index, true, item.label, *(f"{score:.6f}" for score in item.scores.values())]
            file.write("\t".join(map(str, values)) + "\n")


class BestEpoch(TrainerCallback):
    """Scores each epoch on the rows held out for that, and keeps the weights of the best one in the run's folder."""

    def __init__(self, planned: FinetunePlan, log: JsonLines, progress: TrainingProgress) -> None:
        self.plan, self.log, self.progress = planned, log, progress
        self.folder = planned.config.output / BEST
        rows, size = len(planned.data.train), planned.config.batch_size
        self.ends = {math.ceil(epoch * rows / size): epoch for epoch in range(1, planned.config.epochs + 1)}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Score, at the end of an epoch."""
        if (epoch := self.ends.get(state.global_step)) is None:
            return
        data = self.plan.data
        assert data.selection is not None
        with _without_autocast(model):
            logits = split_logits(model, self.plan, data.selection, "selection", None)
        result = score(data.selection, logits, data)
        scores = result.metrics
        self.log.append({"step": state.global_step, "epoch": epoch, **scores})
        self.progress.note(f"epoch {epoch}, {len(data.selection)} rows held out of train: {result}")
        main = data.metrics[0]
        # The score is kept with the weights, so that a run that is killed between the two files never mixes them up.
        if not self.folder.exists() or scores[main] > self._kept()[main]:
            with atomic_folder(self.folder, replace=True) as folder:
                save_weights(model, str(folder / SAFE_WEIGHTS_NAME))
                (folder / SCORES).write_text(json.dumps({"epoch": epoch, **scores}), encoding="utf-8")

    def restore(self, model: PreTrainedModel) -> dict[str, float]:
        """Put the best epoch's weights into the model; return its number and scores."""
        load_weights(model, self.folder / SAFE_WEIGHTS_NAME)
        return self._kept()

    def _kept(self) -> dict[str, float]:
        return json.loads((self.folder / SCORES).read_text(encoding="utf-8"))


@contextmanager
def _without_autocast(model: PreTrainedModel) -> Iterator[None]:
    """Use the model in fp32, as after the training; accelerate's autocast is a `forward` of the instance's own."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            vars(model)["forward"] = wrapped
