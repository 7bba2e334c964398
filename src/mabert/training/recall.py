"""A causal model trained on a recall task from random weights, and asked."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from mabert.data.mlm import IGNORED
from mabert.data.recall import Language, RecallDataset, RecallTask, answers_right
from mabert.inference.loading import default_device
from mabert.training.optim import adamw

# The rows of evaluation are drawn from a stream of their own, which no run trains on.
EVALUATION_SEED = 2**31
WARM_UP = 0.1


@dataclass(frozen=True, kw_only=True)
class RecallRun:
    """How a model is trained on recall."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.1
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0.")


def train_recall(
    model: PreTrainedModel,
    task: RecallTask,
    run: RecallRun,
    report: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train a model on fresh rows of a task, the answers alone being learnt; give the losses of its steps.

    Args:
        report: is given a line about progress and time left now and then.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    device = default_device()
    model.to(device).train()  # type: ignore[arg-type]
    optimizer = adamw(model, learning_rate=run.learning_rate, betas=(0.9, 0.95), weight_decay=run.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * run.steps), run.steps)
    rows = RecallDataset([task], run.steps * run.batch_size, run.seed)
    losses: list[float] = []
    began = said = time.monotonic()
    for batch in DataLoader(rows, batch_size=run.batch_size):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "labels")}
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
            loss = model(**inputs).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss became {losses[-1]} in step {len(losses)}: lower learning_rate={run.learning_rate}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (now := time.monotonic()) - said > 10 or len(losses) == run.steps:
            left = (now - began) / len(losses) * (run.steps - len(losses))
            report(f"step {len(losses):,} of {run.steps:,}, loss {losses[-1]:.4f}, {left:.0f} s left")
            said = now
    return losses


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
    for batch in DataLoader(RecallDataset([task], rows, seed, language), batch_size=batch_size):
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
