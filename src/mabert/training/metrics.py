"""The official GLUE metrics, and the majority class to hold them against. What cannot be computed raises."""

from collections.abc import Callable, Sequence

import numpy as np


def accuracy(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Share of equal labels."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(gold, predicted))


def f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1 (MRPC and QQP: "is a paraphrase")."""
    from sklearn.metrics import f1_score

    if not ((gold == 1).any() or (predicted == 1).any()):
        raise ValueError("F1 is undefined: class 1 is neither among the gold labels nor among the predicted ones.")
    return float(f1_score(gold, predicted, pos_label=1, average="binary"))


def mcc(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews correlation, for two or more classes; 0 where every prediction is the same, as by its definition."""
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(gold)) < 2:
        raise ValueError(f"Matthews correlation is undefined: every gold label is {gold[0]}.")
    return float(matthews_corrcoef(gold, predicted))


def pearson(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Linear correlation."""
    from scipy.stats import pearsonr

    _require_spread("Pearson", gold, predicted)
    return float(pearsonr(gold, predicted).statistic)


def spearman(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    _require_spread("Spearman", gold, predicted)
    return float(spearmanr(gold, predicted).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
}


def compute_metrics(names: Sequence[str], gold: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Each named metric of `predicted` (n,) against `gold` (n,).

    Raises:
        ValueError: a name is unknown, nothing is there to score, shapes differ, a value is NaN or infinite, or a
            metric is undefined on these values.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metric {', '.join(unknown)}; the metrics are {', '.join(METRICS)}.")
    if gold.shape != predicted.shape or gold.ndim != 1:
        raise ValueError(f"gold {gold.shape} and predicted {predicted.shape} must be vectors of one length.")
    if not len(gold):
        raise ValueError("there are no rows to score.")
    for what, values in (("gold", gold), ("predicted", predicted)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{bad} of {len(values)} {what} values are NaN or infinite: no metric can be computed.")
    return {name: METRICS[name](gold, predicted) for name in names}


def majority_baseline(names: Sequence[str], train_labels: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Each named metric of always answering the most frequent class of `train_labels` (the lower one of a tie)."""
    if not len(train_labels):
        raise ValueError("there is no majority class: train has no labels.")
    return compute_metrics(names, gold, np.full_like(gold, np.bincount(train_labels).argmax()))


def _require_spread(name: str, gold: np.ndarray, predicted: np.ndarray) -> None:
    """Raise where a correlation would divide by a standard deviation of zero."""
    if len(gold) < 2:
        raise ValueError(f"{name} correlation needs two rows at least.")
    for what, values in (("gold", gold), ("predicted", predicted)):
        if np.ptp(values) == 0:
            raise ValueError(f"{name} correlation is undefined: every {what} value is {values[0]}.")
