import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mabert.training.metrics import METRICS, compute_metrics, majority_baseline

GOLD = np.array([0, 0, 0, 1, 1, 0, 1, 1])
PREDICTED = np.array([0, 1, 0, 1, 0, 0, 1, 1])  # 3 true and 1 false of each class


def test_classification_metrics_by_hand():
    scores = compute_metrics(["accuracy", "f1", "mcc"], GOLD, PREDICTED)
    assert scores == pytest.approx({"accuracy": 6 / 8, "f1": 6 / 8, "mcc": (3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4)})


def test_classification_metrics_with_more_misses_than_false_alarms_by_hand():
    gold = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    predicted = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])  # 3 true and 1 false of class 1, 4 true and 2 false of class 0
    scores = compute_metrics(["accuracy", "f1", "mcc"], gold, predicted)
    expected = {"accuracy": 7 / 10, "f1": 2 * 3 / (2 * 3 + 1 + 2), "mcc": (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)}
    assert scores == pytest.approx(expected)
    assert [round(score, 4) for score in scores.values()] == [0.7, 0.6667, 0.4082]


def test_three_classes_by_hand():
    gold, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    # 4 of 6 right; each class predicted twice; gold 3, 2 and 1 times: sum of the products 12, of the squares 12 and 14
    expected = {"accuracy": 4 / 6, "mcc": (4 * 6 - 12) / math.sqrt((36 - 12) * (36 - 14))}
    scores = compute_metrics(["accuracy", "mcc"], gold, predicted)
    assert scores == pytest.approx(expected)
    assert [round(score, 4) for score in scores.values()] == [0.6667, 0.5222]
    with pytest.raises(ValueError, match="multiclass"):
        compute_metrics(["f1"], gold, predicted)


@pytest.mark.parametrize(
    ("name", "classes", "of_sklearn"),
    [
        ("accuracy", 2, accuracy_score),
        ("accuracy", 3, accuracy_score),
        ("f1", 2, f1_score),
        ("mcc", 2, matthews_corrcoef),
        ("mcc", 3, matthews_corrcoef),
    ],
)
def test_classification_metrics_are_those_of_scikit_learn(name, classes, of_sklearn):
    rng = np.random.default_rng(0)
    for _ in range(10):
        gold, predicted = rng.integers(classes, size=(2, 60))
        assert compute_metrics([name], gold, predicted)[name] == pytest.approx(of_sklearn(gold, predicted))


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
