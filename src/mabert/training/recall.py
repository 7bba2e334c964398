"""A causal model trained on a recall task from random weights, and asked."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from transformers import PreTrainedModel

from mabert.data.mlm import IGNORED
from mabert.data.recall import CopyTask, Language, RecallDataset, RecallTask, answers_right
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


@dataclass(frozen=True, kw_only=True)
class RecallRun:
    """How a model is trained on recall.

    Trained on long rows with many facts from the start, a model gives some value of the row and never finds out which
    one is asked for. So lessons come first: to copy, then few facts, then more, in rows that hold nothing else.
    """

    copied: int = 0
    """Tokens in the rows of a first lesson, in which a text comes twice; 0 for no such lesson."""
    lessons: tuple[int, ...] = ()
    """Facts in the rows of each lesson."""
    lesson_steps: int = 1_000
    """The most steps of one lesson. After one with facts that was not learnt there are no others."""
    learnt: float = 0.3
    """The loss, in nats a token, at which a lesson ends before that."""
    steps: int
    """After the lessons, on the tasks themselves."""
    tokens: int
    """In the rows of a step; of rows that are longer there is one."""
    learning_rate: float
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("lesson_steps", "steps", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("learning_rate", "learnt"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")

    def lessons_for(self, task: RecallTask) -> list[RecallTask | CopyTask]:
        """The lessons before a task: copying, then its facts in the shortest rows that hold so many.

        Raises:
            ValueError: the vocabulary is too small for the facts of a lesson, or a row for a text that comes twice.
        """
        copying = [CopyTask(length=self.copied, vocab_size=task.vocab_size)] if self.copied else []
        numbers = (1,) if task.kind == "passkey" and self.lessons else self.lessons
        return copying + [RecallTask.shortest(kind=task.kind, pairs=n, vocab_size=task.vocab_size) for n in numbers]


@dataclass(frozen=True)
class Lesson:
    """What became of a lesson."""

    pairs: int
    """Facts in a row; 0 where a text was copied."""
    length: int
    steps: int
    loss: float
    """Mean of its last steps, in nats a token."""
    is_learnt: bool


@dataclass(frozen=True)
class RecallTraining:
    """What a training on recall left beside the model."""

    lessons: list[Lesson]
    """Those that were given."""
    losses: list[float]
    """Of the steps after the lessons."""


def train_recall(
    model: PreTrainedModel,
    tasks: Sequence[RecallTask],
    run: RecallRun,
    report: Callable[[str], None] = lambda line: None,
) -> RecallTraining:
    """Train a model on fresh rows, the answers alone being learnt: the lessons, then the tasks in turns.

    Args:
        tasks: of one kind; a step has rows of one of them.
        report: is given a line about progress and time left now and then.

    Raises:
        ValueError: there are no tasks, or they are of several kinds.
        FloatingPointError: the loss became NaN or infinite.
    """
    if len({(task.kind, task.vocab_size) for task in tasks}) != 1:
        raise ValueError("tasks must be at least one, all of one kind and vocabulary.")
    pupil = _Pupil(model, run, report)
    lessons, losses = [], []
    for lesson in run.lessons_for(tasks[0]):
        lessons.append(pupil.taught(lesson))
        if lessons[-1].pairs and not lessons[-1].is_learnt:
            break
    for step in range(run.steps):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / run.steps)
        losses.append(pupil.step(tasks[step % len(tasks)], decay))
        pupil.say("tasks", step + 1, run.steps, losses[-1])
    return RecallTraining(lessons, losses)


class _Pupil:
    """A model, its optimizer, and how far it is in the stream of rows."""

    def __init__(self, model: PreTrainedModel, run: RecallRun, report: Callable[[str], None]) -> None:
        self.model, self.run, self.report, self.device = model, run, report, default_device()
        model.to(self.device).train()  # type: ignore[arg-type]
        self.optimizer = adamw(model, learning_rate=run.learning_rate, betas=BETAS, weight_decay=0.0)
        self.steps = self.rows = 0
        self.began = self.said = time.monotonic()

    def step(self, task: RecallTask | CopyTask, decay: float = 1.0) -> float:
        """One step on fresh rows of a task; give its loss."""
        end = self.rows + max(1, self.run.tokens // task.length)
        stream = RecallDataset(task, end, self.run.seed)
        batch = default_collate([stream[row] for row in range(self.rows, end)])
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.learning_rate * min(1.0, (self.steps + 1) / WARM_UP) * decay
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            loss = self.model(**{name: batch[name].to(self.device) for name in ("input_ids", "labels")}).loss
        self.rows, self.steps = end, self.steps + 1
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"the loss became {value} in step {self.steps}: lower learning_rate={self.run.learning_rate}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def taught(self, task: RecallTask | CopyTask) -> Lesson:
        """Steps on a task until it is learnt, or there were enough of them."""
        losses: deque[float] = deque(maxlen=RECENT)
        pairs = task.pairs if isinstance(task, RecallTask) else 0
        name = f"lesson of {pairs}" if pairs else "copying"
        for step in range(1, self.run.lesson_steps + 1):
            losses.append(self.step(task))
            loss = sum(losses) / len(losses)
            is_learnt = len(losses) == RECENT and loss < self.run.learnt
            self.say(name, step, self.run.lesson_steps, loss, ended=is_learnt)
            if is_learnt:
                break
        return Lesson(pairs, task.length, step, loss, is_learnt)

    def say(self, what: str, step: int, steps: int, loss: float, ended: bool = False) -> None:
        """Report how far this part is, every ten seconds and at its end."""
        now = time.monotonic()
        if step == 1:
            self.began = now
        if now - self.said > 10 or step == steps or ended:
            left = 0 if ended else (now - self.began) / step * (steps - step)
            self.report(f"{what}: step {step:,} of {steps:,}, loss {loss:.4f}, {left:.0f} s left of it at most")
            self.said = now


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
    """
    was_training = model.training
    model.eval()
    right: list[Tensor] = []
    loss = tokens = 0.0
    for batch in DataLoader(RecallDataset(task, rows, seed, language), batch_size=batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels, segments = inputs.pop("labels"), inputs.pop("segments")
        probe = {} if memories == "both" else {"segments": segments, "memories": memories}
        logits = model(**inputs, **probe, use_cache=False).logits
        right.append(answers_right(logits, labels))
        is_answer = labels[:, 1:] != IGNORED
        loss += cross_entropy(logits[:, :-1][is_answer].float(), labels[:, 1:][is_answer], reduction="sum").item()
        tokens += int(is_answer.sum())
    model.train(was_training)
    return RecallScore(float(torch.cat(right).float().mean()), loss / tokens)
