import json
import math
import statistics
import time

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mabert.experiments.comparison import mean_and_spread, mean_interval, metric_of_tables, paired_comparison
from mabert.training.metrics import compute_metrics

SKLEARN = {"accuracy": accuracy_score, "f1": f1_score, "mcc": matthews_corrcoef}


def labels(*rows):
    return np.array([[int(label) for label in row] for row in rows])


def with_errors(gold, share, rng):
    """The gold labels of two classes, a share of them wrong."""
    return np.where(rng.random(len(gold)) < share, 1 - gold, gold)


# Mean and spread


def test_the_interval_of_a_mean_is_students():
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-3)  # 2.776 · 1.581 / √5
    low, high = mean_interval([1, 2, 3, 4, 5], confidence=0.5)
    assert high - low < 1.1
    with pytest.raises(ValueError, match="one value has no interval"):
        mean_interval([1.0])


def test_mean_and_sample_standard_deviation():
    mean, spread = mean_and_spread([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert spread == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert mean_and_spread([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="no values to average"):
        mean_and_spread([])


# The difference


def test_two_rows_by_hand():
    """B is right on the first row only: a resample has the difference 0, 1/2, 1/2 or 1."""
    found = paired_comparison(np.array([0, 1]), labels("01"), labels("00"), "accuracy")
    assert found == {
        "metric": "accuracy",
        "difference": 0.5,
        "low": 0.0,
        "high": 1.0,
        "confidence": 0.95,
        "rows": 2,
        "seeds": 1,
        "pretrained": 1,
        "resamples": 2000,
        "undefined": 0,
    }
    assert json.loads(json.dumps(found)) == found
    narrow = paired_comparison(np.array([0, 1]), labels("01"), labels("00"), "accuracy", confidence=0.4)
    assert (narrow["low"], narrow["high"], narrow["confidence"]) == (0.5, 0.5, 0.4)


def test_two_seeds_by_hand():
    """The first seed of A is always right, the others never: the seeds drawn say 0, 1/2, 1/2 or 1, the rows nothing."""
    gold, never = np.ones(50, dtype=int), np.zeros((2, 50), dtype=int)
    found = paired_comparison(gold, np.stack([gold, never[0]]), never, "accuracy")
    assert (found["difference"], found["low"], found["high"]) == (0.5, 0.0, 1.0)


def test_pretrained_models_are_drawn_before_their_seeds():
    """The first model of A is always right, the second never, by each of its 20 seeds: seeds drawn at random from all
    40 would make the interval look narrow."""
    gold = np.ones(50, dtype=int)
    always, never = np.tile(gold, (20, 1)), np.zeros((20, 50), dtype=int)
    a, b = np.concatenate([always, never]), np.zeros((40, 50), dtype=int)
    found = paired_comparison(gold, a, b, "accuracy", pretrained=2)
    assert (found["difference"], found["low"], found["high"]) == (0.5, 0.0, 1.0)
    assert (found["seeds"], found["pretrained"]) == (40, 2)
    as_one = paired_comparison(gold, a, b, "accuracy")
    assert 0.3 < as_one["low"] < as_one["high"] < 0.7


def test_seeds_are_drawn_within_their_pretrained_model():
    """One model with the same two seeds as two models' one each: the chance of the seeds is the same."""
    gold, never = np.ones(50, dtype=int), np.zeros((2, 50), dtype=int)
    a = np.stack([gold, never[0]])
    found = [paired_comparison(gold, a, never, "accuracy", pretrained=n) for n in (1, 2)]
    assert [(one["low"], one["high"]) for one in found] == [(0.0, 1.0)] * 2


def test_the_difference_is_that_of_the_means_over_seeds():
    gold = labels("00001111")[0]
    a, b = labels("00001111", "00001110"), labels("00001100", "01010101")
    found = {m: paired_comparison(gold, a, b, m)["difference"] for m in ("accuracy", "f1", "mcc")}
    # right of 8: 8 and 7 against 6 and 4; F1 = 2·tp / (2·tp + fp + fn); MCC = (tp·tn - fp·fn) / √…
    assert found == pytest.approx(
        {
            "accuracy": 15 / 16 - 10 / 16,
            "f1": (1 + 6 / 7) / 2 - (4 / 6 + 4 / 8) / 2,
            "mcc": (1 + 12 / math.sqrt(240)) / 2 - (8 / math.sqrt(192) + 0) / 2,
        }
    )


@pytest.mark.parametrize("metric", ["accuracy", "f1", "mcc"])
@pytest.mark.parametrize("seeds", [1, 5])
def test_a_model_does_not_differ_from_itself(metric, seeds):
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(2, size=200), rng.integers(2, size=(seeds, 200))
    found = paired_comparison(gold, predicted, predicted.copy(), metric)
    assert (found["difference"], found["low"], found["high"]) == (0, 0, 0)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "mcc"])
@pytest.mark.parametrize("seeds", [1, 5])
def test_a_planted_difference_is_found_in_its_direction(metric, seeds):
    rng = np.random.default_rng(0)
    gold = rng.integers(2, size=500)
    good, bad = (np.stack([with_errors(gold, share, rng) for _ in range(seeds)]) for share in (0.1, 0.25))
    better, worse = paired_comparison(gold, good, bad, metric), paired_comparison(gold, bad, good, metric)
    assert 0 < better["low"] < better["difference"] < better["high"]
    assert worse["low"] < worse["difference"] < worse["high"] < 0
    assert (better["rows"], better["seeds"]) == (500, seeds)


def test_rows_and_seeds_are_paired():
    """Seeds of very different quality, B wrong on 15 more rows of 1,000 each time: alone, neither score is so sure."""
    rng = np.random.default_rng(0)
    gold = rng.integers(2, size=1000)
    a = np.stack([with_errors(gold, share, rng) for share in (0.1, 0.2, 0.3, 0.4, 0.5)])
    b = a.copy()
    for of_a, of_b in zip(a, b, strict=True):
        right = rng.choice(np.flatnonzero(of_a == gold), 15, replace=False)
        of_b[right] = 1 - gold[right]
    found = paired_comparison(gold, a, b, "accuracy")
    assert found["difference"] == pytest.approx(0.015)
    assert 0.005 < found["low"] < found["high"] < 0.025


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    gold, a, b = rng.integers(2, size=100), rng.integers(2, size=(2, 100)), rng.integers(2, size=(2, 100))
    assert paired_comparison(gold, a, b, "mcc") == paired_comparison(gold, a, b, "mcc")
    other = paired_comparison(gold, a, b, "mcc", seed=1)
    assert other["low"] != paired_comparison(gold, a, b, "mcc")["low"]
    assert other["difference"] == paired_comparison(gold, a, b, "mcc")["difference"]


# The interval


@pytest.mark.parametrize("seeds", [1, 5])
def test_equal_models_are_told_apart_in_one_case_of_twenty(seeds):
    """Two models with weak spots of their own, seeds that mostly share them; 200 times."""
    rng = np.random.default_rng(0)

    def predictions(gold):
        weak = with_errors(gold, 0.2, rng)
        return np.stack([np.where(rng.random(300) < 0.2, with_errors(gold, 0.2, rng), weak) for _ in range(seeds)])

    covered = 0
    for _ in range(200):
        gold = rng.integers(2, size=300)
        found = paired_comparison(gold, predictions(gold), predictions(gold), "accuracy", resamples=400)
        covered += found["low"] <= 0 <= found["high"]
    assert 0.9 <= covered / 200 <= 0.99


def test_the_interval_is_that_of_a_loop_over_resamples():
    rng = np.random.default_rng(0)
    gold = rng.integers(2, size=80)
    a, b = (np.stack([with_errors(gold, share, rng) for _ in range(3)]) for share in (0.1, 0.3))
    differences = []
    for _ in range(2000):
        rows, seeds = rng.integers(80, size=80), rng.integers(3, size=3)
        scores = [[np.corrcoef(gold[rows], model[seed][rows])[0, 1] for seed in seeds] for model in (a, b)]
        differences.append(statistics.fmean(scores[0]) - statistics.fmean(scores[1]))
    found = paired_comparison(gold, a, b, "mcc", resamples=4000, confidence=0.9)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(differences, [0.05, 0.95]), abs=0.02)


def test_a_wider_confidence_has_a_wider_interval_and_more_rows_a_narrower_one():
    rng = np.random.default_rng(0)
    gold, a, b = rng.integers(2, size=400), rng.integers(2, size=(2, 400)), rng.integers(2, size=(2, 400))

    def width(rows, confidence):
        found = paired_comparison(gold[:rows], a[:, :rows], b[:, :rows], "accuracy", confidence=confidence)
        return found["high"] - found["low"]

    assert width(400, 0.5) < width(400, 0.95) < width(100, 0.95)
    single = paired_comparison(gold, a, b, "accuracy", resamples=1)
    assert single["low"] == single["high"] != single["difference"]


def test_twenty_thousand_rows_take_seconds():
    rng = np.random.default_rng(0)
    gold, a, b = rng.integers(2, size=20_000), rng.integers(2, size=(5, 20_000)), rng.integers(2, size=(5, 20_000))
    began = time.process_time()
    paired_comparison(gold, a, b, "mcc")
    assert time.process_time() - began < 10


# Undefined resamples


def test_resamples_without_a_score_are_counted_and_left_out():
    gold = labels("00001111")[0]
    found = paired_comparison(gold, labels("00001111"), labels("01010101"), "mcc")
    assert found["undefined"] == pytest.approx(2000 * 2 / 2**8, abs=15)  # all eight drawn from one class
    assert -1 <= found["low"] <= found["high"] <= 2
    assert paired_comparison(gold, labels("00001111"), labels("01010101"), "accuracy")["undefined"] == 0


def test_too_many_resamples_without_a_score_raise():
    gold = labels("00000001")[0]
    with pytest.raises(ValueError, match=r"f1 is undefined on [67]\d\d of 2000 resamples of 8 rows, too many"):
        paired_comparison(gold, labels("11111111"), labels("00000001"), "f1")  # the positive is missed in (7/8)^8


def test_f1_is_undefined_only_where_a_seed_without_a_score_was_drawn():
    gold = np.array([1] * 3 + [0] * 17)
    always = np.ones(20, dtype=int)
    assert paired_comparison(gold, always[None], always[None], "f1")["undefined"] == 0
    two = np.stack([always, gold])
    found = paired_comparison(gold, two, two, "f1", resamples=20_000)
    assert found["undefined"] == pytest.approx(20_000 * (17 / 20) ** 20 * 3 / 4, rel=0.1)


@pytest.mark.parametrize("metric", ["f1", "mcc"])
def test_a_metric_that_is_undefined_on_the_rows_themselves_raises(metric):
    nothing = np.zeros((1, 4), dtype=int)
    with pytest.raises(ValueError, match="is undefined"):
        paired_comparison(nothing[0], nothing, nothing, metric)


# The metrics


@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 2), ("accuracy", 3), ("f1", 2), ("mcc", 2), ("mcc", 3)])
def test_metrics_of_tables_are_those_of_the_package_and_of_scikit_learn(metric, classes):
    rng = np.random.default_rng(0)
    for rows in (12, 50, 1000):
        gold, predicted = rng.integers(classes, size=(20, rows)), rng.integers(classes, size=(20, rows))
        predicted[0] = classes - 1
        tables = np.zeros((20, classes, classes))
        for table, of_gold, of_predicted in zip(tables, gold, predicted, strict=True):
            np.add.at(table, (of_gold, of_predicted), 1)
        pairs = list(zip(gold, predicted, strict=True))
        found = metric_of_tables(metric, tables)
        assert found == pytest.approx([compute_metrics([metric], *pair)[metric] for pair in pairs], abs=1e-12)
        assert found == pytest.approx([SKLEARN[metric](*pair) for pair in pairs], abs=1e-12)


def test_metrics_of_tables_are_nan_where_the_package_raises():
    one_class, no_positives = np.array([[3.0, 2.0], [0.0, 0.0]]), np.array([[5.0, 0.0], [0.0, 0.0]])
    assert np.isnan(metric_of_tables("mcc", one_class))
    assert np.isnan(metric_of_tables("f1", no_positives))
    assert metric_of_tables("f1", one_class) == 0
    assert metric_of_tables("mcc", one_class.T) == 0


# Bad input


@pytest.mark.parametrize(
    ("gold", "a", "b", "changes", "message"),
    [
        ([0, 1], [[0, 1]], [[0, 1]], {"metric": "pearson"}, "by 'pearson'; there are accuracy, f1, mcc"),
        ([0, 1], [[0, 1]], [[0, 1], [0, 1]], {}, r"same seeds and rows, not \(1, 2\) and \(2, 2\)"),
        ([0, 1, 1], [[0, 1]], [[0, 1]], {}, r"gold \(3,\) must be \(rows,\)"),
        ([0, 1], [0, 1], [0, 1], {}, r"must be .*\(seeds, rows\) .*not \(2,\)"),
        ([[0, 1]], [[0, 1]], [[0, 1]], {}, r"gold \(1, 2\) must be \(rows,\)"),
        ([0, 1], [[0.0, 1.0]], [[0, 1]], {}, "predicted_a must hold classes, integers from 0; it is float64"),
        ([0, 1], [[0, 1]], [[0, -1]], {}, "predicted_b must hold classes, integers from 0; it is int64, from -1"),
        ([0, -1], [[0, 1]], [[0, 1]], {}, "gold must hold classes"),
        ([0, 1, 2], [[0, 1, 2]], [[0, 1, 2]], {"metric": "f1"}, "f1 is that of class 1 of two classes.*label 2"),
        ([0, 1], [[0, 1]], [[0, 1]], {"resamples": 0}, "resamples=0 must be at least 1"),
        ([0, 1], [[0, 1]] * 3, [[0, 1]] * 3, {"pretrained": 2}, "3 seeds are not as many of each of pretrained=2"),
        ([0, 1], [[0, 1]], [[0, 1]], {"confidence": 95}, "confidence=95 between 0 and 1"),
    ],
)
def test_bad_input_raises(gold, a, b, changes, message):
    choices = {"metric": "accuracy"} | changes
    with pytest.raises(ValueError, match=message):
        paired_comparison(np.array(gold), np.array(a), np.array(b), **choices)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_nothing_to_compare_raises(shape):
    nothing = np.zeros(shape, dtype=int)
    with pytest.raises(ValueError, match="no rows, or no seeds"):
        paired_comparison(np.zeros(shape[1], dtype=int), nothing, nothing, "accuracy")
