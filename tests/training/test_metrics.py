import math

import numpy as np
import pytest

from mabert.training.metrics import METRICS, compute_metrics, majority_baseline

GOLD = np.array([0, 0, 0, 1, 1, 0, 1, 1])
PREDICTED = np.array([0, 1, 0, 1, 0, 0, 1, 1])  # 3 true and 1 false of each class


def test_classification_metrics_by_hand():
    scores = compute_metrics(["accuracy", "f1", "mcc"], GOLD, PREDICTED)
    assert scores == pytest.approx({"accuracy": 6 / 8, "f1": 6 / 8, "mcc": (3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4)})


def test_f1_is_that_of_class_1():
    assert compute_metrics(["f1"], np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))["f1"] == pytest.approx(2 / 3)


def test_mcc_of_several_classes():
    gold = np.array([0, 1, 2, 0, 1, 2])
    assert compute_metrics(["mcc"], gold, gold)["mcc"] == 1.0


def test_mcc_of_a_constant_prediction_is_zero():
    assert compute_metrics(["mcc"], GOLD, np.zeros_like(GOLD))["mcc"] == 0.0


def test_regression_metrics():
    gold = np.array([0.0, 1.0, 2.0, 3.0])
    scores = compute_metrics(["pearson", "spearman"], gold, gold**3)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(np.corrcoef(gold, gold**3)[0, 1])
    assert scores["pearson"] < 0.95


def test_majority_class_is_that_of_train():
    scores = majority_baseline(["accuracy", "f1", "mcc"], np.array([1, 1, 0]), np.array([0, 0, 0, 1]))
    assert scores == pytest.approx({"accuracy": 0.25, "f1": 0.4, "mcc": 0.0})
    assert majority_baseline(["accuracy"], np.array([0, 0, 1]), np.array([0, 0, 0, 1])) == {"accuracy": 0.75}
    with pytest.raises(ValueError, match="train has no labels"):
        majority_baseline(["accuracy"], np.array([], dtype=int), GOLD)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_score_raises(name):
    with pytest.raises(ValueError, match="no rows to score"):
        compute_metrics([name], np.array([]), np.array([]))


@pytest.mark.parametrize("name", METRICS)
def test_nan_raises(name):
    predicted = np.linspace(0, 1, len(GOLD))
    predicted[3] = np.nan
    with pytest.raises(ValueError, match="1 of 8 predicted values are NaN"):
        compute_metrics([name], GOLD, predicted)


@pytest.mark.parametrize(
    ("name", "gold", "predicted", "message"),
    [
        ("f1", [0, 0], [0, 0], "class 1 is neither"),
        ("mcc", [1, 1], [0, 1], "every gold label is 1"),
        ("pearson", [1.0, 2.0], [3.0, 3.0], "every predicted value is 3"),
        ("spearman", [2.0, 2.0], [3.0, 4.0], "every gold value is 2"),
        ("pearson", [2.0], [3.0], "two rows at least"),
        ("accuracy", [1, 1], [0], "one length"),
        ("bleu", [1], [1], "unknown metric bleu; the metrics are accuracy"),
    ],
)
def test_undefined_metrics_raise(name, gold, predicted, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics([name], np.array(gold), np.array(predicted))
