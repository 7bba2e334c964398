"""Training on recall: it is learnt where attention can, asked fairly, and probed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mabert import HybridConfig, HybridForCausalLM, MaBertConfig, MaBertForMaskedLM
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


@pytest.mark.parametrize("training", [True, False])
def test_it_is_asked_without_dropout_and_goes_on_as_it_was(training):
    model = made(hidden_dropout_prob=0.5).train(training)
    assert evaluate_recall(model, TASK, 16) == evaluate_recall(model, TASK, 16)
    assert model.training is training


@pytest.mark.parametrize("memories", ["recurrent-only", "attention-only", "none"])
def test_a_model_that_no_probe_reaches_is_asked_without_one_only(memories):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    assert evaluate_recall(model, TASK, 8).loss > 2
    with pytest.raises(ValueError, match=f"memories='{memories}' is for hybrids by layer: GPT2LMHeadModel takes no"):
        evaluate_recall(model, TASK, 8, memories=memories)


def run(**choices):
    return RecallRun(**{"steps": 5, "tokens": 4 * TASK.length, "learning_rate": 1e-3} | choices)


def test_the_same_seed_trains_the_same_model():
    assert train_recall(made(), [TASK], run()) == train_recall(made(), [TASK], run())
    assert train_recall(made(), [TASK], run(seed=1)) != train_recall(made(), [TASK], run())


class TestLessons:
    MQAR = RecallTask(kind="mqar", length=30, pairs=4, vocab_size=40)

    def test_they_are_copying_and_the_facts_in_the_shortest_rows(self):
        given = run(lessons=(2, 0, 3), lesson_steps=(1, 1, 1), copied=24)
        two, copying, three = given.lessons_for(self.MQAR)
        assert (two.pairs, two.length, two.vocab_size) == (2, 11, 40)
        assert copying == CopyTask(length=24, vocab_size=40)
        assert (three.pairs, three.length, three.vocab_size) == (3, 16, 40)
        assert run().lessons_for(self.MQAR) == []
        one, copying, same = given.lessons_for(TASK)
        assert (one.pairs, same.pairs) == (1, 1), "a text holds one passkey"
        assert copying == CopyTask(length=24, vocab_size=40)
        with pytest.raises(ValueError, match="mqar with 16 pairs takes a vocabulary of at least 78 tokens"):
            run(lessons=(2, 16), lesson_steps=(1, 1)).lessons_for(self.MQAR)

    def test_every_model_gets_the_same_rows_in_the_same_order(self, monkeypatch):
        monkeypatch.setattr(recall, "SAY_SECONDS", 0)
        choices = {"copied": 24, "lessons": (0, 2, 3), "lesson_steps": (4, 3, 3), "lesson_tokens": 33, "steps": 5}
        seen, said = [], []
        for pattern in ("S", "T"):
            model = made(pattern)
            model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
            training = train_recall(model, [self.MQAR], run(**choices, tokens=90), said.append)
            given = [(lesson.pairs, lesson.length, lesson.steps) for lesson in training.lessons]
            assert given == [(0, 24, 4), (2, 11, 3), (3, 16, 3)]
            assert (training.taught, len(training.losses), training.steps) == (10, 5, 15)
        assert all(torch.equal(one, other) for one, other in zip(seen[:15], seen[15:], strict=True))
        assert [tuple(ids.shape) for ids in seen[:15]] == [(1, 24)] * 4 + [(3, 11)] * 3 + [(2, 16)] * 3 + [(3, 30)] * 5
        assert said[3].startswith("copying: step 4 of 15, loss ")
        assert said[6].startswith("lesson of 2: step 7 of 15, loss ")
        assert said[14].startswith("tasks: step 15 of 15, loss ")

    @pytest.mark.parametrize(("loss", "after"), [(0.17, RECENT + 10), (0.18, None)])
    def test_who_only_guesses_among_the_values_of_a_row_has_not_learnt_it(self, monkeypatch, loss, after):
        """Two facts: the guesser's loss is 0.35; half of it tells one who finds the fact."""
        losses = iter([9.0] * 10 + [loss] * 100)
        monkeypatch.setattr(recall._Pupil, "step", lambda *_: next(losses))
        assert RecallTask.shortest(kind="mqar", pairs=2, vocab_size=40).guessing_loss == pytest.approx(np.log(2) / 2)
        training = train_recall(made(), [self.MQAR], run(lessons=(2,), lesson_steps=(50,)))
        assert training.lessons[0].learnt_after == after
        assert training.lessons[0].loss == pytest.approx(loss)

    @pytest.mark.parametrize(("loss", "after"), [(0.29, RECENT), (0.31, None)])
    def test_copying_and_many_facts_have_one_measure(self, monkeypatch, loss, after):
        monkeypatch.setattr(recall._Pupil, "step", lambda *_: loss)
        training = train_recall(made(), [self.MQAR], run(copied=24, lessons=(0, 4), lesson_steps=(25, 25)))
        assert [lesson.learnt_after for lesson in training.lessons] == [after] * 2

    def test_what_was_taught_is_learnt(self):
        model = made()
        choices = {"lesson_steps": (400, 60, 60), "lesson_tokens": 512, "steps": 60, "tokens": 512}
        training = train_recall(model, [self.MQAR], run(copied=24, lessons=(0, 2, 4), learning_rate=1e-2, **choices))
        copying, *facts = training.lessons
        assert 2 * RECENT < copying.learnt_after < 400
        assert all(lesson.learnt_after for lesson in facts)
        assert self.MQAR.guessing(500, EVALUATION_SEED) < 0.65
        assert evaluate_recall(model, self.MQAR, 64).accuracy > 0.95


class KilledError(Exception):
    """The end of the process, planted."""


CHOICES = {"copied": 24, "lessons": (0, 2, 3), "lesson_steps": (8, 8, 8), "lesson_tokens": 48, "steps": 16}


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
        model = made(hidden_dropout_prob=0.1)
        torch.manual_seed(99)
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
        other = made()
        other.get_input_embeddings().weight.data[0, 0] += 1
        cases = [(made(), [TASK], {"seed": 1}), (made(), [longer], {}), (made("A"), [TASK], {}), (other, [TASK], {})]
        for model, tasks, choices in cases:
            with pytest.raises(ValueError, match=r"training.pt is of another model, other tasks or other choices"):
                train_recall(model, tasks, run(**choices), checkpoint=path)


class TestText:
    """Plain text beside the rows, which keeps a language model one."""

    LANGUAGE = Language(words=np.arange(40), text=np.tile(np.arange(5, 35), 40))

    def taught(self, model, **choices):
        return train_recall(model, [TASK], run(steps=60, learning_rate=1e-2), language=self.LANGUAGE, **choices)

    def test_a_model_learns_the_text_that_it_is_taught_beside(self):
        with_text, without = made("A"), made("A")
        losses = self.taught(with_text, text_shape=(4, 24)).text
        assert self.taught(without).text == []
        assert len(losses) == 60
        ids = torch.from_numpy(self.LANGUAGE.text[:24])[None]
        learnt, not_learnt = (model(ids, labels=ids).loss.item() for model in (with_text, without))
        assert learnt < 2 < 3 < not_learnt
        assert losses[-1] < 2 < 3 < losses[0]

    def test_rows_of_text_are_other_ones_in_every_step_and_learnt_whole(self):
        model, batches = made(), []
        model.register_forward_pre_hook(lambda _, args, inputs: batches.append(inputs), with_kwargs=True)
        train_recall(model, [TASK], run(steps=3, tokens=24), language=self.LANGUAGE, text_shape=(2, 30))
        texts = batches[1::2]
        assert [tuple(batch["input_ids"].shape) for batch in texts] == [(2, 30)] * 3
        assert all((batch["input_ids"] == batch["labels"]).all() for batch in texts)
        assert len({tuple(row.tolist()) for batch in texts for row in batch["input_ids"]}) > 3

    def test_a_stopped_training_goes_on_with_its_text(self, tmp_path, monkeypatch):
        whole = self.taught(made(), text_shape=(2, 24))
        monkeypatch.setattr(recall, "SAVE_SECONDS", -1)
        learn, calls = recall._Pupil._learn, iter(range(60))

        def dies(self, *args):
            if next(calls) == 41:
                raise KeyboardInterrupt
            return learn(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(recall._Pupil, "_learn", dies)
            with pytest.raises(KeyboardInterrupt):
                self.taught(made(), text_shape=(2, 24), checkpoint=tmp_path / "training.pt")
        assert self.taught(made(), text_shape=(2, 24), checkpoint=tmp_path / "training.pt") == whole
        with pytest.raises(ValueError, match="other tasks or other choices"):
            self.taught(made(), text_shape=(1, 24), checkpoint=tmp_path / "training.pt")

    def test_text_without_a_language_or_too_little_of_it_is_refused(self):
        with pytest.raises(ValueError, match=r"text_shape=\(1, 24\) .* give the language"):
            train_recall(made(), [TASK], run(), text_shape=(1, 24))
        for shape in ((0, 24), (1, 1), (1, 1201)):
            with pytest.raises(ValueError, match=r"at least one row .* which are 1,200"):
                train_recall(made(), [TASK], run(), language=self.LANGUAGE, text_shape=shape)
        short = replace(self.LANGUAGE, text=self.LANGUAGE.text[:23])
        with pytest.raises(ValueError, match=r"23 tokens.* a row of 24"):
            train_recall(made(), [TASK], run(), language=short)


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
        taught = WARM_UP + 8
        train_recall(made(), [TASK], run(lessons=(1,), lesson_steps=(taught,), lesson_tokens=24, steps=54, tokens=24))
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

    def test_a_text_with_more_tokens_than_the_model_is_refused(self):
        language = replace(self.LANGUAGE, text=np.full(50, 150))
        with pytest.raises(ValueError, match="the model has 150 tokens, but the task 151"):
            self.batches(evaluate_recall, TASK, 8, language=language)

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


def test_copying_is_no_task():
    with pytest.raises(ValueError, match="copying is a lesson"):
        train_recall(made(), [CopyTask(length=24)], run())


def test_a_model_that_sees_the_answers_is_refused():
    config = MaBertConfig(vocab_size=600, hidden_size=16, num_attention_heads=2, intermediate_size=16, pattern="M")
    encoder = MaBertForMaskedLM(config)
    for use in (lambda: train_recall(encoder, [TASK], run()), lambda: evaluate_recall(encoder, TASK, 2)):
        with pytest.raises(ValueError, match="MaBertForMaskedLM would see the answers in its input"):
            use()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", {"model": {}}, [1, 2]])
def test_a_checkpoint_of_something_else_is_named(tmp_path, content):
    path = tmp_path / "recall.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"recall\.pt is no checkpoint of a training on recall"):
        train_recall(made(), [TASK], run(), checkpoint=path)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"lessons": (2,), "lesson_steps": (0,)}, r"lesson_steps=.0,. must be a number above 0 for each of lessons"),
        ({"lessons": (2, 3), "lesson_steps": (5,)}, r"lesson_steps=.5,. must be a number above 0 for each of lessons"),
        ({"lesson_tokens": 0}, "lesson_tokens=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_bad_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        run(**choices)
