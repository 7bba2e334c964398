"""Labels, or numbers, from a fine-tuned model folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
from transformers import AutoModelForSequenceClassification

from mabert.data.tables import read_table
from mabert.files import atomic_write
from mabert.inference.batches import Runner, RunOptions, progress_bar
from mabert.inference.loading import ModelFolderError


@dataclass(frozen=True)
class Prediction:
    """What a model says about one text or pair."""

    label: str | float
    """The most probable label; of a regression model, the number."""
    scores: dict[str, float]
    """The probability of every label; empty for regression."""


def predict(
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    model_folder: str | Path,
    **options: Unpack[RunOptions],
) -> list[Prediction]:
    """One prediction a text, or a text and its partner in `pairs`. For the options see `RunOptions`.

    The labels of a model exclude each other; one that gives a text several labels or numbers is refused.

    Raises:
        ModelFolderError: the folder cannot be used, holds no trained classification head, or one of several labels
            (`multi_label_classification`) or numbers a text.
        ValueError: there are no texts, or one is longer than `max_length` tokens and not to be cut.
    """
    return _predict(texts, pairs, model_folder, "text", **options)


def predict_file(
    source: str | Path,
    output: str | Path,
    *,
    model_folder: str | Path,
    text_column: str = "text",
    text_pair_column: str | None = None,
    **options: Unpack[RunOptions],
) -> list[Prediction]:
    """Predict every row of a table; write index, label and its probability (.tsv), or label and all scores (.jsonl).

    Raises:
        ModelFolderError, ValueError: as `predict`, and for a table that cannot be read.
    """
    output = Path(output)
    if output.suffix not in WRITERS:
        raise ValueError(f"{output} must end in {' or '.join(WRITERS)}")
    table = read_table(source, text_columns=[text_column, *([text_pair_column] if text_pair_column else [])])
    predictions = _predict(table.texts, table.pairs, model_folder, f"{source}, row", **options)
    with atomic_write(output, "w") as file:
        file.writelines(f"{line}\n" for line in WRITERS[output.suffix](predictions))
    return predictions


def predictions_of(logits: np.ndarray, labels: Sequence[str]) -> list[Prediction]:
    """Read logits (n, labels) as labels with their softmax; those of a single label are the numbers."""
    if len(labels) == 1:
        return [Prediction(float(value), {}) for value in logits[:, 0]]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    return [Prediction(labels[row.argmax()], dict(zip(labels, row.tolist(), strict=True))) for row in probabilities]


def _predict(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    model_folder: str | Path,
    name: str,
    **options: Unpack[RunOptions],
) -> list[Prediction]:
    runner = Runner(AutoModelForSequenceClassification, model_folder, **options)
    config = runner.model.config
    kind = "regression" if config.num_labels == 1 else "single_label_classification"
    if config.problem_type not in (None, kind):
        raise ModelFolderError(
            f"{model_folder} was trained for {config.problem_type} with {config.num_labels} labels, and a prediction "
            "is one label or one number a text: read the logits of AutoModelForSequenceClassification instead"
        )
    features, cut = runner.tokenize(texts, pairs, name=name)
    runner.say_cut(cut, len(texts))
    with progress_bar("predicting", len(texts), runner.console) as advance:
        logits = runner.run(features, lambda inputs: runner.model(**inputs).logits, advance)
    return predictions_of(logits, [label for _, label in sorted((config.id2label or {}).items())])


def _tsv(predictions: Sequence[Prediction]) -> list[str]:
    rows = [
        f"{index}\t{item.label}" + (f"\t{max(item.scores.values()):.6f}" if item.scores else "")
        for index, item in enumerate(predictions)
    ]
    return ["index\tlabel" + "\tprobability" * bool(predictions[0].scores), *rows]


def _jsonl(predictions: Sequence[Prediction]) -> list[str]:
    return [
        json.dumps({"index": index, "label": item.label, "scores": item.scores}, ensure_ascii=False)
        for index, item in enumerate(predictions)
    ]


WRITERS = {".tsv": _tsv, ".jsonl": _jsonl}
