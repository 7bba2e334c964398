"""A causal model trained on a recall task, and asked."""

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedModel

from mabert.data.mlm import IGNORED
from mabert.data.recall import CopyTask, Language, RecallDataset, RecallTask, answers_right
from mabert.files import atomic_write, remove_leftovers
from mabert.inference.loading import default_device
from mabert.training.optim import adamw

# The rows of evaluation are drawn from a stream of their own, which no run trains on.
EVALUATION_SEED = 2**31
# CHOICE: a transition is to be found, and not a text to be compressed: a shorter memory of the gradients than in
# language modelling, and no decay
BETAS = (0.9, 0.99)
WARM_UP = 100
"""Steps until the learning rate is at its height."""
RECENT = 20
"""Steps over which the loss is averaged where it decides whether a lesson is learnt."""
LEARNT = 0.3
"""The loss, in nats a token, below which a lesson is learnt; or half of what guessing among the values of a row gets,
where that is lower."""
SAY_SECONDS, SAVE_SECONDS = 10, 60


@dataclass(frozen=True, kw_only=True)
class RecallRun:
    """How a model is trained on recall: every model by the same rows in the same order.

    Trained on long rows with many facts from the start, a model gives some value of the row and never finds out which
    one is asked for. So lessons come first: to copy, then few facts, then more, in rows that hold nothing else.
    """

    lessons: tuple[int, ...] = ()
    """Facts in the rows of each lesson; 0 for a lesson in which a text comes twice, to be copied."""
    lesson_steps: tuple[int, ...] = ()
    """Of each of them."""
    lesson_tokens: int = 512
    """In the rows of a step in a lesson."""
    copied: int = 24
    """Tokens in a row in which a text comes twice."""
    steps: int
    """On the tasks themselves, after the lessons."""
    tokens: int
    """In the rows of such a step; of rows that are longer there is one."""
    learning_rate: float
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("lesson_tokens", "steps", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(self.lesson_steps) != len(self.lessons) or any(steps < 1 for steps in self.lesson_steps):
            raise ValueError(
                f"lesson_steps={self.lesson_steps} must be a number above 0 for each of lessons={self.lessons}."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")

    def lessons_for(self, task: RecallTask) -> list[RecallTask | CopyTask]:
        """The lessons before a task: copying, or its facts in the shortest rows that hold so many (a passkey is one).

        Raises:
            ValueError: the vocabulary is too small for the facts of a lesson, or a row for a text that comes twice.
        """

        def lesson(facts: int) -> RecallTask | CopyTask:
            if not facts:
                return CopyTask(length=self.copied, vocab_size=task.vocab_size)
            pairs = 1 if task.kind == "passkey" else facts
            return RecallTask.shortest(kind=task.kind, pairs=pairs, vocab_size=task.vocab_size)

        return [lesson(facts) for facts in self.lessons]


@dataclass(frozen=True)
class Lesson:
    """What became of a lesson."""

    pairs: int
    """Facts in a row; 0 where a text was copied."""
    length: int
    steps: int
    loss: float
    """Mean of its last steps, in nats a token."""
    learnt_after: int | None
    """Steps until the loss was that of one who has learnt it; None where it never was."""


@dataclass
class RecallTraining:
    """How far a training on recall is."""

    lessons: list[Lesson] = field(default_factory=list)
    """Those that are over."""
    lesson: list[float] = field(default_factory=list)
    """The losses of the one that is going on."""
    losses: list[float] = field(default_factory=list)
    """Of the steps on the tasks."""
    text: list[float] = field(default_factory=list)
    """The losses of plain text, of every step that had any."""
    rows: int = 0
    """Rows of the stream that were trained on."""

    @property
    def taught(self) -> int:
        """Steps in lessons."""
        return sum(lesson.steps for lesson in self.lessons) + len(self.lesson)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.taught + len(self.losses)


def train_recall(
    model: PreTrainedModel,
    tasks: Sequence[RecallTask],
    run: RecallRun,
    report: Callable[[str], None] = lambda line: None,
    *,
    language: Language | None = None,
    text_shape: tuple[int, int] | None = None,
    checkpoint: Path | None = None,
) -> RecallTraining:
    """Train a model on fresh rows, of which the answers alone are learnt: the lessons, then the tasks in turns.

    Args:
        tasks: of one kind; a step has rows of one of them.
        report: is given a line about progress and time left now and then.
        language: teach in the tokens of a tokenizer, with real text between the facts.
        text_shape: (rows, tokens of each) of the language's text that every step predicts as well. Answers alone make a
            language model forget its language.
        checkpoint: a file to which everything is saved once a minute and at the end; if it is there, the training goes
            on from it, with the losses that it would have had without the stop.

    Raises:
        ValueError: there are no tasks, or they are of several kinds, or have more tokens than the model; text is to be
            predicted, and there is no language, or less of its text than a row; or the checkpoint is that of another
            training: other weights at its beginning, other tasks or choices.
        FloatingPointError: the loss became NaN or infinite.
    """
    if any(not isinstance(task, RecallTask) for task in tasks):
        raise ValueError("tasks must be RecallTasks: copying is a lesson, lessons=(0, ...) of the run.")
    if len({(task.kind, task.vocab_size) for task in tasks}) != 1:
        raise ValueError("tasks must be at least one, all of one kind and vocabulary.")
    _check_model(model, tasks[0], language)
    if text_shape is not None:
        _check_text(text_shape, language)
    if language is not None:
        for task in tasks:
            language.check(task)
    pupil = _Pupil(model, tasks, run, language, text_shape, checkpoint)
    lessons, done = run.lessons_for(tasks[0]), pupil.training
    steps = sum(run.lesson_steps) + run.steps
    first, began = done.steps, time.monotonic()
    said = saved = began
    while done.steps < steps:
        if len(done.lessons) < len(lessons):
            what, loss = pupil.study(lessons[len(done.lessons)])
        else:
            decay = 0.5 + 0.5 * math.cos(math.pi * len(done.losses) / run.steps)
            what, loss = "tasks", pupil.step(tasks[len(done.losses) % len(tasks)], run.tokens, decay)
            done.losses.append(loss)
        now, is_end = time.monotonic(), done.steps == steps
        if now - said > SAY_SECONDS or is_end:
            left = (now - began) / (done.steps - first) * (steps - done.steps)
            report(f"{what}: step {done.steps:,} of {steps:,}, loss {loss:.4f}, {left:.0f} s left")
            said = now
        if now - saved > SAVE_SECONDS or is_end:
            pupil.save()
            saved = time.monotonic()
    return done


def _check_model(model: PreTrainedModel, task: RecallTask, language: Language | None) -> None:
    if not model.can_generate():
        raise ValueError(
            f"recall is for models that predict the next token: {type(model).__name__} would see the answers in its "
            "input. Give a causal language model."
        )
    has, needs = model.config.vocab_size, task.vocab_size if language is None else language.highest + 1
    if has < needs:
        raise ValueError(f"the model has {has:,} tokens, but the task {needs:,}: give fewer, or another model.")


def _check_text(shape: tuple[int, int], language: Language | None) -> None:
    rows, length = shape
    if language is None:
        raise ValueError(f"text_shape={shape} is that of a language's text: give the language.")
    if rows < 1 or not 2 <= length <= len(language.text):
        raise ValueError(
            f"text_shape={shape} must be at least one row of at least 2 tokens, and of no more than the language's "
            f"text has, which are {len(language.text):,}."
        )


def _check_probe(model: PreTrainedModel, memories: str) -> None:
    # one that takes any arguments would leave these unread, and give the score without a probe
    if not {"segments", "memories"} <= inspect.signature(model.forward).parameters.keys():
        raise ValueError(
            f"memories={memories!r} is for hybrids by layer: {type(model).__name__} takes no segments and memories to "
            "be probed by. Leave memories at 'both', or give a HybridForCausalLM."
        )


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of the weights, in hexadecimal."""
    whole = hashlib.sha256()
    for name, weight in model.state_dict().items():
        whole.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _learnt_after(losses: Sequence[float], guessed: float) -> int | None:
    """Steps until the mean of the last ones was low enough."""
    enough = min(LEARNT, guessed / 2 if guessed else math.inf)
    ends = range(RECENT, len(losses) + 1)
    return next((end for end in ends if fmean(losses[end - RECENT : end]) < enough), None)


class _Pupil:
    """A model, its optimizer, and how far they are."""

    def __init__(
        self,
        model: PreTrainedModel,
        tasks: Sequence[RecallTask],
        run: RecallRun,
        language: Language | None,
        text_shape: tuple[int, int] | None,
        checkpoint: Path | None,
    ) -> None:
        self.model, self.run, self.language, self.checkpoint = model, run, language, checkpoint
        self.text_shape = text_shape
        self.device, self.training = default_device(), RecallTraining()
        model.to(self.device).train()  # type: ignore[arg-type]
        self.optimizer = adamw(model, learning_rate=run.learning_rate, betas=BETAS, weight_decay=0.0)
        if checkpoint is not None:
            whole = {
                "run": asdict(run),
                "tasks": [asdict(task) for task in tasks],
                "model": model.config.to_diff_dict(),
                "language": None if language is None else language.digest,
                "text_shape": text_shape,
                "weights": _digest(model),
            }
            self.identity = json.dumps(whole, sort_keys=True, default=str)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(checkpoint.parent, checkpoint.name)
            if checkpoint.exists():
                self._load(checkpoint)

    def study(self, lesson: RecallTask | CopyTask) -> tuple[str, float]:
        """One step of a lesson, after whose last one it is over; give its name and the loss."""
        done = self.training
        done.lesson.append(self.step(lesson, self.run.lesson_tokens))
        loss, pairs = done.lesson[-1], lesson.pairs if isinstance(lesson, RecallTask) else 0
        if (steps := len(done.lesson)) == self.run.lesson_steps[len(done.lessons)]:
            learnt = _learnt_after(done.lesson, lesson.guessing_loss)
            done.lessons.append(Lesson(pairs, lesson.length, steps, fmean(done.lesson[-RECENT:]), learnt))
            done.lesson = []
        return f"lesson of {pairs}" if pairs else "copying", loss

    def step(self, task: RecallTask | CopyTask, tokens: int, decay: float = 1.0) -> float:
        """One step on fresh rows of a task, of so many tokens; give its loss."""
        begin = self.training.rows
        end = begin + max(1, tokens // task.length)
        stream = RecallDataset(task, end, self.run.seed, self.language)
        batch = default_collate([stream[row] for row in range(begin, end)])
        step = self.training.steps + 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.learning_rate * min(1.0, step / WARM_UP) * decay
        value = self._learn(batch["input_ids"], batch["labels"])
        if self.text_shape:
            ids = self._text(step, *self.text_shape)
            self.training.text.append(self._learn(ids, ids))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.training.rows = end
        return value

    def _learn(self, ids: Tensor, labels: Tensor) -> float:
        """Add the gradients of a batch to those of the step; give its loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            loss = self.model(input_ids=ids.to(self.device), labels=labels.to(self.device)).loss
        if not math.isfinite(value := loss.item()):
            step = self.training.steps + 1
            raise FloatingPointError(
                f"the loss became {value} in step {step}: lower learning_rate={self.run.learning_rate}"
            )
        loss.backward()
        return value

    def _text(self, step: int, rows: int, length: int) -> Tensor:
        """Rows of plain text from anywhere, other ones in each step."""
        assert self.language is not None
        rng, anything = np.random.default_rng([self.run.seed, step]), np.empty(0, np.int64)
        return torch.from_numpy(np.stack([self.language.text_at(rng, length, anything) for _ in range(rows)]))

    def save(self) -> None:
        """Write all that a later process needs to go on."""
        if self.checkpoint is None:
            return
        state: dict[str, Any] = {
            "identity": self.identity,
            "training": asdict(self.training),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state()
        with atomic_write(self.checkpoint) as file:
            torch.save(state, file)

    def _load(self, checkpoint: Path) -> None:
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as cause:  # whatever a file of another program makes of the reader
            raise ValueError(
                f"{checkpoint} is no checkpoint of a training on recall, or a damaged one ({type(cause).__name__}): "
                "delete it, or name another file."
            ) from cause
        if identity != self.identity:
            raise ValueError(
                f"{checkpoint} is of another model, other tasks or other choices: delete it, or name another file."
            )
        done = state["training"]
        self.training = RecallTraining(**done | {"lessons": [Lesson(**lesson) for lesson in done["lessons"]]})
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"])


@dataclass(frozen=True)
class RecallScore:
    """What a model answered."""

    accuracy: float
    """Share of the questions whose answer was right in all of its tokens."""
    loss: float
    """Mean cross-entropy of the answers' tokens, in nats."""


@torch.no_grad()
def evaluate_recall(
    model: PreTrainedModel,
    task: RecallTask,
    rows: int,
    *,
    memories: str = "both",
    batch_size: int = 64,
    seed: int = EVALUATION_SEED,
    language: Language | None = None,
) -> RecallScore:
    """What the model answers to the questions of so many rows.

    Args:
        memories: what may cross from the facts to the questions, for a probe of a hybrid: "recurrent-only",
            "attention-only", "none".
        language: ask in the tokens of a tokenizer, with real text between the facts.

    Raises:
        ValueError: there are no rows to ask, the model has fewer tokens than the task, or it cannot be probed.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1.")
    _check_model(model, task, language)
    if memories != "both":
        _check_probe(model, memories)
    was_training = model.training
    model.eval()
    right: list[Tensor] = []
    loss = tokens = 0.0
    try:
        for batch in DataLoader(RecallDataset(task, rows, seed, language), batch_size=batch_size):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels, segments = inputs.pop("labels"), inputs.pop("segments")
            probe = {} if memories == "both" else {"segments": segments, "memories": memories}
            logits = model(**inputs, **probe, use_cache=False).logits
            right.append(answers_right(logits, labels))
            is_answer = labels[:, 1:] != IGNORED
            loss += cross_entropy(logits[:, :-1][is_answer].float(), labels[:, 1:][is_answer], reduction="sum").item()
            tokens += int(is_answer.sum())
    finally:
        model.train(was_training)
    return RecallScore(float(torch.cat(right).float().mean()), loss / tokens)
