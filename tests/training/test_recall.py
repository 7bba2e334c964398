"""Training on recall: it is learnt where attention can, asked fairly, and probed."""

import pytest
import torch

from mabert import HybridConfig, HybridForCausalLM
from mabert.data.recall import CopyTask, RecallTask
from mabert.training.recall import EVALUATION_SEED, RECENT, WARM_UP, RecallRun, evaluate_recall, train_recall

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
    run = RecallRun(steps=500, tokens=32 * TASK.length, learning_rate=1e-2)
    return model, train_recall(model, [TASK], run, said.append).losses, said


def test_a_passkey_is_learnt(trained):
    model, losses, said = trained
    assert losses[-1] < 0.2 * losses[0]
    assert evaluate_recall(model, TASK, 64).accuracy > 0.9
    assert said[-1].startswith("tasks: step 500 of 500, loss ")


def test_without_either_memory_nothing_is_recalled(trained):
    model, _, _ = trained
    assert evaluate_recall(model, TASK, 64, memories="none").accuracy < 0.05


def test_what_is_asked_was_not_trained_on(trained):
    model, _, _ = trained
    rows = {tuple(TASK.sample(0, index).ids) for index in range(200)}
    assert not rows & {tuple(TASK.sample(EVALUATION_SEED, index).ids) for index in range(64)}
    assert evaluate_recall(model, TASK, 64) == evaluate_recall(model, TASK, 64)
    one, other = (evaluate_recall(model, TASK, 64, batch_size=size) for size in (7, 64))
    assert one.accuracy == other.accuracy
    assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_a_model_of_random_weights_recalls_nothing():
    score = evaluate_recall(made(), TASK, 64)
    assert score.accuracy < 0.05
    assert score.loss > 2


def run(**choices):
    return RecallRun(**{"steps": 5, "tokens": 4 * TASK.length, "learning_rate": 1e-3} | choices)


def test_the_same_seed_trains_the_same_model():
    assert train_recall(made(), [TASK], run()) == train_recall(made(), [TASK], run())
    assert train_recall(made(), [TASK], run(seed=1)) != train_recall(made(), [TASK], run())


class TestLessons:
    MQAR = RecallTask(kind="mqar", length=30, pairs=4, vocab_size=40)

    def test_they_are_the_facts_in_the_shortest_rows(self):
        lessons = run(lessons=(2, 3)).lessons_for(self.MQAR)
        assert [(lesson.pairs, lesson.length, lesson.vocab_size) for lesson in lessons] == [(2, 11, 40), (3, 16, 40)]
        assert run().lessons_for(self.MQAR) == []
        assert [lesson.pairs for lesson in run(lessons=(2, 3)).lessons_for(TASK)] == [1], "a text holds one passkey"
        copying, *others = run(copied=24, lessons=(2, 3)).lessons_for(self.MQAR)
        assert copying == CopyTask(length=24, vocab_size=40)
        assert others == lessons
        with pytest.raises(ValueError, match="mqar with 16 pairs takes a vocabulary of at least 78 tokens"):
            run(lessons=(2, 16)).lessons_for(self.MQAR)

    def test_one_ends_once_it_is_learnt_and_otherwise_after_its_steps(self):
        said: list[str] = []
        choices = {"copied": 24, "lessons": (2, 3), "lesson_steps": 30}
        lessons = train_recall(made(), [self.MQAR], run(**choices, learnt=1e-6), said.append).lessons
        given = [(lesson.pairs, lesson.length, lesson.steps, lesson.is_learnt) for lesson in lessons]
        assert given == [(0, 24, 30, False), (2, 11, 30, False)], "no three facts after two that were not learnt"
        assert "copying: step 30 of 30, loss " in said[0]
        assert "lesson of 2: step 30 of 30, loss " in said[1]
        lessons = train_recall(made(), [self.MQAR], run(lessons=(2, 3), lesson_steps=30, learnt=100.0)).lessons
        assert [(lesson.steps, lesson.is_learnt) for lesson in lessons] == [(RECENT, True)] * 2

    def test_copying_is_learnt(self):
        model = made()
        choices = {"tokens": 1_000, "learning_rate": 1e-2, "lesson_steps": 500, "steps": 1}
        (lesson,) = train_recall(model, [self.MQAR], run(copied=24, **choices)).lessons
        assert lesson.is_learnt
        assert lesson.steps > 2 * RECENT
        assert lesson.loss < 0.3

    def test_what_was_taught_is_learnt(self):
        model = made()
        choices = {"tokens": 64 * 11, "learning_rate": 1e-2, "lesson_steps": 500, "steps": 1}
        (lesson,) = train_recall(model, [self.MQAR], run(lessons=(2,), **choices)).lessons
        assert lesson.is_learnt
        assert lesson.loss < 0.3
        assert evaluate_recall(model, run(lessons=(2,)).lessons_for(self.MQAR)[0], 64).accuracy > 0.8


class TestSteps:
    """What the model is given, and how fast it learns from it."""

    def test_tasks_take_turns_and_no_row_comes_twice(self):
        model, batches = made(), []
        model.register_forward_pre_hook(lambda _, args, inputs: batches.append(inputs["input_ids"]), with_kwargs=True)
        tasks = [TASK, RecallTask(kind="passkey", length=96, vocab_size=40)]
        train_recall(model, tasks, run(steps=4, tokens=96))
        assert [tuple(batch.shape) for batch in batches] == [(4, 24), (1, 96), (4, 24), (1, 96)]
        rows = {tuple(row.tolist()) for batch in batches for row in batch}
        assert len(rows) == 10

    def test_a_row_longer_than_a_step_is_a_step(self):
        model, batches = made(), []
        model.register_forward_pre_hook(lambda _, args, inputs: batches.append(inputs["input_ids"]), with_kwargs=True)
        train_recall(model, [TASK], run(steps=1, tokens=1))
        assert [tuple(batch.shape) for batch in batches] == [(1, 24)]

    def test_the_learning_rate_rises_stays_in_the_lessons_and_falls_after_them(self, monkeypatch):
        rates = []
        step = torch.optim.AdamW.step

        def recorded(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
        train_recall(made(), [TASK], run(lessons=(1,), lesson_steps=WARM_UP + 5, learnt=1e-9, steps=4, tokens=24))
        assert rates[:WARM_UP] == pytest.approx([1e-3 * (n + 1) / WARM_UP for n in range(WARM_UP)])
        assert rates[WARM_UP : WARM_UP + 5] == [1e-3] * 5
        assert rates[WARM_UP + 5 :] == pytest.approx([1e-3, 1e-3 * (0.5 + 0.5 * 0.5**0.5), 5e-4, 1e-3 * 0.1464466])


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(FloatingPointError, match=r"lower learning_rate=1e\+32"):
        train_recall(made(), [TASK], run(steps=50, learning_rate=1e32))


def test_tasks_of_several_kinds_and_none_are_refused():
    for tasks in ([], [TASK, TestLessons.MQAR]):
        with pytest.raises(ValueError, match="at least one, all of one kind and vocabulary"):
            train_recall(made(), tasks, run())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"lesson_steps": 0}, "lesson_steps=0 must be at least 1"),
        ({"learnt": 0.0}, "learnt=0.0 must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ],
)
def test_bad_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        run(**choices)
