"""Training on recall: it is learnt where attention can, asked fairly, and probed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mabert import HybridConfig, HybridForCausalLM
from mabert.data.recall import CopyTask, Language, RecallTask
from mabert.training import recall
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

    def test_one_ends_after_its_steps_and_the_next_one_comes(self, monkeypatch):
        monkeypatch.setattr(recall, "SAY_SECONDS", 0)
        said: list[str] = []
        choices = {"copied": 24, "lessons": (2, 3), "lesson_steps": 30, "steps": 200}
        training = train_recall(made(), [self.MQAR], run(**choices, learnt=1e-6), said.append)
        given = [(lesson.pairs, lesson.length, lesson.steps, lesson.is_learnt) for lesson in training.lessons]
        assert given == [(0, 24, 30, False), (2, 11, 30, False), (3, 16, 30, False)]
        assert training.steps == 200
        assert len(training.losses) == 110
        assert said[29].startswith("copying: step 30 of 200, loss ")
        assert said[59].startswith("lesson of 2: step 60 of 200, loss ")
        assert said[199].startswith("tasks: step 200 of 200, loss ")

    def test_one_ends_once_it_is_learnt_and_the_tasks_have_the_other_steps(self):
        training = train_recall(made(), [TASK], run(copied=24, lessons=(1,), lesson_steps=30, steps=200, learnt=100.0))
        assert [(lesson.steps, lesson.is_learnt) for lesson in training.lessons] == [(RECENT, True)] * 2
        assert len(training.losses) == 200 - 2 * RECENT

    def test_a_third_of_the_steps_is_for_the_tasks_however_slow_a_model_is(self):
        training = train_recall(made(), [self.MQAR], run(lessons=(2, 3, 4), lesson_steps=30, steps=61, learnt=1e-6))
        assert [(lesson.pairs, lesson.steps) for lesson in training.lessons] == [(2, 30), (3, 10)]
        assert len(training.losses) == 21
        assert training.taught == 40

    @pytest.mark.parametrize(("learnt", "is_learnt"), [(0.3, True), (0.02, False)])
    def test_who_only_guesses_among_the_values_of_a_row_has_not_learnt_it(self, monkeypatch, learnt, is_learnt):
        """Two facts: the guesser's loss is 0.35, below which `learnt` may lie without a thing being found."""
        monkeypatch.setattr(recall._Pupil, "step", lambda self, task, decay=1.0: 0.17)
        assert self.two.guessing_loss == pytest.approx(0.5 * np.log(2))
        training = train_recall(made(), [self.two], run(lessons=(2,), steps=100, learnt=learnt))
        assert training.lessons[0].is_learnt is is_learnt
        monkeypatch.setattr(recall._Pupil, "step", lambda self, task, decay=1.0: 0.18)
        assert not train_recall(made(), [self.two], run(lessons=(2,), steps=100, learnt=0.3)).lessons[0].is_learnt

    two = RecallTask(kind="mqar", length=30, pairs=2, vocab_size=40)

    def test_copying_is_learnt(self):
        model = made()
        choices = {"tokens": 1_000, "learning_rate": 1e-2, "lesson_steps": 500, "steps": 1_000}
        (lesson,) = train_recall(model, [self.MQAR], run(copied=24, **choices)).lessons
        assert lesson.is_learnt
        assert lesson.steps > 2 * RECENT
        assert lesson.loss < 0.3

    def test_what_was_taught_is_learnt(self):
        model = made()
        choices = {"tokens": 32 * 30, "learning_rate": 1e-2, "lesson_steps": 400, "steps": 1_000}
        training = train_recall(model, [self.MQAR], run(copied=24, lessons=(2, 4), **choices))
        assert [lesson.is_learnt for lesson in training.lessons] == [True] * 3
        assert self.MQAR.guessing(500, EVALUATION_SEED) < 0.65
        assert evaluate_recall(model, self.MQAR, 64).accuracy > 0.95


class KilledError(Exception):
    """The end of the process, planted."""


CHOICES = {"copied": 24, "lessons": (2, 3), "lesson_steps": 8, "steps": 40}


class TestGoingOn:
    """A training that is stopped goes on from its checkpoint as if nothing had been."""

    def killed_after(self, steps, monkeypatch, checkpoint, model, **choices):
        def step(self, *args, **kwargs):
            if self.training.steps == steps:
                raise KilledError
            return original(self, *args, **kwargs)

        original = recall._Pupil.step
        with monkeypatch.context() as patch:
            patch.setattr(recall._Pupil, "step", step)
            with pytest.raises(KilledError):
                train_recall(model, [TestLessons.MQAR], run(**CHOICES, **choices), checkpoint=checkpoint)

    @pytest.mark.parametrize("steps", [5, 8, 11, 30])
    def test_with_the_same_losses_and_weights(self, steps, monkeypatch, tmp_path):
        whole = made(hidden_dropout_prob=0.1)
        expected = train_recall(whole, [TestLessons.MQAR], run(**CHOICES))
        monkeypatch.setattr(recall, "SAVE_SECONDS", -1)
        checkpoint = tmp_path / "scratch" / "training.pt"
        torch.manual_seed(0)
        self.killed_after(steps, monkeypatch, checkpoint, made(hidden_dropout_prob=0.1))
        torch.manual_seed(99)
        model = HybridForCausalLM(HybridConfig(**SIZES, pattern="S", hidden_dropout_prob=0.1))
        taken: list[None] = []
        model.register_forward_pre_hook(lambda *_: taken.append(None))
        assert train_recall(model, [TestLessons.MQAR], run(**CHOICES), checkpoint=checkpoint) == expected
        assert len(taken) == 40 - steps
        for name, weight in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight), name

    def test_what_is_finished_is_not_trained_again(self, tmp_path):
        first = train_recall(made(), [TASK], run(), checkpoint=tmp_path / "training.pt")
        model = made()
        model.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
        assert train_recall(model, [TASK], run(), checkpoint=tmp_path / "training.pt") == first

    def test_a_checkpoint_of_other_choices_is_refused(self, tmp_path):
        path = tmp_path / "training.pt"
        train_recall(made(), [TASK], run(), checkpoint=path)
        longer = replace(TASK, length=30)
        for model, tasks, choices in ((made(), [TASK], {"seed": 1}), (made(), [longer], {}), (made("A"), [TASK], {})):
            with pytest.raises(ValueError, match=r"training.pt is of another model, other tasks or other choices"):
                train_recall(model, tasks, run(**choices), checkpoint=path)


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
        taught, steps = WARM_UP + 8, 162
        train_recall(made(), [TASK], run(lessons=(1,), lesson_steps=steps, learnt=1e-9, steps=steps, tokens=24))
        assert rates[:WARM_UP] == pytest.approx([1e-3 * (n + 1) / WARM_UP for n in range(WARM_UP)])
        assert rates[WARM_UP:taught] == [1e-3] * 8
        falling = [1e-3 * (0.5 + 0.5 * np.cos(np.pi * n / 54)) for n in range(54)]
        assert rates[taught:] == pytest.approx(falling)


class TestLanguage:
    """The same in the tokens of a tokenizer."""

    LANGUAGE = Language(words=np.arange(100, 140), text=np.full(50, 99))

    def batches(self, function, *args, **kwargs):
        torch.manual_seed(0)
        model, batches = HybridForCausalLM(HybridConfig(**SIZES | {"vocab_size": 150}, pattern="S")), []
        model.register_forward_pre_hook(lambda _, args, inputs: batches.append(inputs["input_ids"]), with_kwargs=True)
        function(model, *args, **kwargs)
        return torch.cat([batch.flatten() for batch in batches])

    def test_it_is_asked_and_taught_in_it(self):
        asked = self.batches(evaluate_recall, TASK, 8, language=self.LANGUAGE)
        taught = self.batches(train_recall, [TASK], run(), language=self.LANGUAGE)
        for ids in (asked, taught):
            assert ids.min() == 99, "the text stands between"
            assert set(ids.unique().tolist()) <= {99, *range(100, 140)}
        assert self.batches(evaluate_recall, TASK, 8).max() < 40

    def test_a_checkpoint_is_of_one_language(self, tmp_path):
        self.batches(train_recall, [TASK], run(), language=self.LANGUAGE, checkpoint=tmp_path / "training.pt")
        other = Language(words=self.LANGUAGE.words + 1, text=self.LANGUAGE.text)
        with pytest.raises(ValueError, match="is of another model, other tasks"):
            self.batches(train_recall, [TASK], run(), language=other, checkpoint=tmp_path / "training.pt")

    def test_a_model_with_fewer_tokens_is_refused(self):
        for function, tasks in ((evaluate_recall, (TASK, 8)), (train_recall, ([TASK], run()))):
            with pytest.raises(ValueError, match="the model has 40 tokens, but the task 140"):
                function(made(), *tasks, language=self.LANGUAGE)
        large = replace(TASK, vocab_size=41)
        for function, tasks in ((evaluate_recall, (large, 8)), (train_recall, ([large], run()))):
            with pytest.raises(ValueError, match="the model has 40 tokens, but the task 41"):
                function(made(), *tasks)


def test_no_rows_to_ask_are_refused():
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        evaluate_recall(made(), TASK, 0)


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
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_bad_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        run(**choices)
