"""Two models side by side: how far apart are they, and how sure is that?"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from mabert.training.metrics import compute_metrics

COMPARABLE = ("accuracy", "f1", "mcc")
MAX_UNDEFINED = 0.05
RESAMPLES_AT_ONCE = 250


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; one value has no spread (None)."""
    if not len(values):
        raise ValueError("there are no values to average.")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the mean of more such values lies, by Student's t.

    Raises:
        ValueError: there are fewer than two values.
    """
    from scipy.stats import t

    mean, spread = mean_and_spread(values)
    if spread is None:
        raise ValueError("one value has no interval.")
    half = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * spread / len(values) ** 0.5
    return mean - half, mean + half


def paired_comparison(
    gold: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    metric: str,
    *,
    pretrained: int = 1,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """How much better A does than B on the same rows, with a bootstrap interval.

    Each resample draws the rows anew with replacement, and the fine-tuning seeds too, as pairs: seed i of A with seed i
    of B. The interval holds the middle `confidence` of the resampled differences. With one pretrained model of each it
    speaks of these two, not of others pretrained alike; of several, those are drawn first, also as pairs, and then the
    seeds of each. One seed shows the chance of the rows alone. Where few seeds differ in how good they are, the
    interval is too narrow, as any bootstrap of few; where they err on rows of their own, it is too wide.

    Args:
        gold: (rows,) labels, int64.
        predicted_a: (seeds, rows) labels.
        predicted_b: (seeds, rows) labels.
        metric: accuracy, f1 or mcc.
        pretrained: models behind the seeds, which stand model by model, as many of each.

    Returns:
        {"metric", "difference", "low", "high", "confidence", "rows", "seeds", "pretrained", "resamples", "undefined"}:
        the difference is the mean over the seeds of A's score minus B's. A resample on which a seed's metric is
        undefined (MCC where all gold labels drawn are the same, F1 where no label is 1) is left out of the interval and
        counted.

    Raises:
        ValueError: shapes do not fit, the seeds are not as many of each pretrained model, a label is no class, the
            metric is another one or undefined on the rows themselves, or more than a twentieth of the resamples is
            undefined.
    """
    predicted = _checked(gold, predicted_a, predicted_b, metric, resamples, confidence)
    seeds, rows = predicted_a.shape
    if pretrained < 1 or seeds % pretrained:
        raise ValueError(f"{seeds} seeds are not as many of each of pretrained={pretrained} models.")
    scores = [compute_metrics([metric], gold, labels)[metric] for labels in predicted]
    difference = statistics.fmean(scores[:seeds]) - statistics.fmean(scores[seeds:])

    # Rows that all models answer alike are exchangeable: how often each kind of row is drawn says everything.
    classes = int(max(gold.max(), predicted.max())) + 1
    kinds, counts = np.unique(np.vstack([gold, predicted]), axis=1, return_counts=True)
    cells = np.eye(classes**2)[kinds[0] * classes + kinds[1:]]  # (2 · seeds, kinds, classes²), one-hot
    rng = np.random.default_rng(seed)
    found = []
    for first in range(0, resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, resamples - first)
        drawn = rng.multinomial(rows, counts / rows, size=size).astype(np.float64)
        tables = (drawn @ cells).reshape(2, seeds, size, classes, classes)
        a, b = metric_of_tables(metric, tables)
        weights = _drawn_seeds(rng, pretrained, seeds // pretrained, size) / seeds
        found.append(np.where(weights > 0, weights * (a - b).T, 0.0).sum(axis=1))
    differences = np.concatenate(found)
    undefined = int(np.isnan(differences).sum())
    if undefined > MAX_UNDEFINED * resamples:
        raise ValueError(
            f"{metric} is undefined on {undefined} of {resamples} resamples of {rows} rows, too many for an interval: "
            "the rows are too few, or nearly all of one class."
        )
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(differences, [tail, 1 - tail])
    return {
        "metric": metric,
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "confidence": confidence,
        "rows": rows,
        "seeds": seeds,
        "pretrained": pretrained,
        "resamples": resamples,
        "undefined": undefined,
    }


def _drawn_seeds(rng: np.random.Generator, pretrained: int, of_each: int, size: int) -> np.ndarray:
    """How often each seed is drawn, (size, pretrained · of_each): first models, then seeds of each drawn one."""
    models = rng.multinomial(pretrained, np.full(pretrained, 1 / pretrained), size=size)
    drawn = [rng.multinomial(of_each * times, np.full(of_each, 1 / of_each)) for times in models.T]
    return np.concatenate(drawn, axis=1)


def metric_of_tables(metric: str, tables: np.ndarray) -> np.ndarray:
    """The metric of each of many confusion tables (..., gold, predicted), as `mabert.training.metrics` has it; NaN
    where that raises."""
    total, right = tables.sum((-2, -1)), np.trace(tables, axis1=-2, axis2=-1)
    of_gold, of_predicted = tables.sum(-1), tables.sum(-2)
    if metric == "accuracy":
        return right / total
    if metric == "f1":
        named = of_gold[..., 1] + of_predicted[..., 1]
        return _ratio(2 * tables[..., 1, 1], named, named > 0)
    covariance = right * total - (of_gold * of_predicted).sum(-1)
    spread_gold, spread_predicted = (total**2 - (of_any**2).sum(-1) for of_any in (of_gold, of_predicted))
    scores = _ratio(covariance, np.sqrt(spread_gold * spread_predicted), spread_gold > 0)
    return np.where((spread_gold > 0) & (spread_predicted == 0), 0.0, scores)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=defined & (denominator > 0))


def _checked(
    gold: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    metric: str,
    resamples: int,
    confidence: float,
) -> np.ndarray:
    """All predictions, A's above B's."""
    if metric not in COMPARABLE:
        raise ValueError(f"no paired comparison by {metric!r}; there are {', '.join(COMPARABLE)}.")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples={resamples} must be at least 1, and confidence={confidence} between 0 and 1.")
    if gold.ndim != 1 or predicted_a.shape != predicted_b.shape or predicted_a.shape[1:] != gold.shape:
        raise ValueError(
            f"gold {gold.shape} must be (rows,), and the predictions of both models (seeds, rows) of the same seeds "
            f"and rows, not {predicted_a.shape} and {predicted_b.shape}."
        )
    if not predicted_a.size:
        raise ValueError("there are no rows, or no seeds, to compare.")
    for name, labels in (("gold", gold), ("predicted_a", predicted_a), ("predicted_b", predicted_b)):
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(f"{name} must hold classes, integers from 0; it is {labels.dtype}, from {labels.min()}.")
    predicted = np.concatenate([predicted_a, predicted_b])
    if metric == "f1" and (highest := max(gold.max(), predicted.max())) > 1:
        raise ValueError(f"f1 is that of class 1 of two classes, but there is a label {highest}.")
    return predicted
