"""Training on recall: it is learnt where attention can, asked fairly, and probed."""

import pytest
import torch

from mabert import HybridConfig, HybridForCausalLM
from mabert.data.recall import RecallTask
from mabert.training.recall import RecallRun, evaluate_recall, train_recall

TASK = RecallTask(kind="passkey", length=24, vocab_size=40)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "state_size": 16,
    "mamba_head_size": 16,
    "initializer_range": 0.1,
}


def made(pattern="S", **choices):
    torch.manual_seed(0)
    return HybridForCausalLM(HybridConfig(**SIZES, pattern=pattern, **choices))


@pytest.fixture(scope="module")
def trained():
    model, said = made(), []
    losses = train_recall(model, TASK, RecallRun(steps=500, batch_size=32, learning_rate=1e-2), said.append)
    return model, losses, said


def test_a_passkey_is_learnt(trained):
    model, losses, said = trained
    assert losses[-1] < 0.2 * losses[0]
    assert evaluate_recall(model, TASK, 64).accuracy > 0.9
    assert said[-1].startswith("step 500 of 500, loss ")


def test_without_either_memory_nothing_is_recalled(trained):
    model, _, _ = trained
    assert evaluate_recall(model, TASK, 64, memories="none").accuracy < 0.05


def test_what_is_asked_was_not_trained_on(trained):
    model, _, _ = trained
    rows = {tuple(TASK.sample(0, index).ids) for index in range(200)}
    from mabert.training.recall import EVALUATION_SEED

    assert not rows & {tuple(TASK.sample(EVALUATION_SEED, index).ids) for index in range(64)}
    assert evaluate_recall(model, TASK, 64) == evaluate_recall(model, TASK, 64)
    one, other = (evaluate_recall(model, TASK, 64, batch_size=size) for size in (7, 64))
    assert one.accuracy == other.accuracy
    assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_a_model_of_random_weights_recalls_nothing():
    score = evaluate_recall(made(), TASK, 64)
    assert score.accuracy < 0.05
    assert score.loss > 2


def test_the_same_seed_trains_the_same_model():
    run = RecallRun(steps=5, batch_size=4, learning_rate=1e-3)
    assert train_recall(made(), TASK, run) == train_recall(made(), TASK, run)
    other = RecallRun(steps=5, batch_size=4, learning_rate=1e-3, seed=1)
    assert train_recall(made(), TASK, other) != train_recall(made(), TASK, run)


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(FloatingPointError, match=r"lower learning_rate=1e\+30"):
        train_recall(made(), TASK, RecallRun(steps=50, batch_size=4, learning_rate=1e30))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ],
)
def test_bad_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        RecallRun(**{"steps": 1, "batch_size": 1, "learning_rate": 1e-3} | choices)
