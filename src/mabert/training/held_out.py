"""Held-out loss of a language model, beside what a predictor without context could reach."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from mabert.data.mlm import IGNORED, Key, collate_rows
from mabert.data.shards import unigram_entropy
from mabert.training.objectives import labelled_logits

LARGEST_EXPONENT = math.log(sys.float_info.max)  # math.exp raises OverflowError above it


@dataclass(frozen=True)
class HeldOut:
    """What one pass over the held-out rows measured."""

    length: int
    """Tokens in a row."""
    loss: float
    """Mean cross-entropy of the predicted tokens, in nats."""
    perplexity: float
    accuracy: float
    unigram_entropy: float
    """Entropy in nats of the rows' own token distribution: the best loss of any predictor that ignores context."""
    labels: int
    """Predicted tokens that the means are over."""


@torch.no_grad()
def evaluate_held_out(
    model: PreTrainedModel,
    dataset: Any,
    keys: Sequence[Key],
    *,
    batch_size: int,
    special_ids: Sequence[int] | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> HeldOut:
    """Evaluate `model` on the rows named by `keys`; the processes share the work and all receive the whole result.

    The unigram entropy is that of the rows without special tokens, which are never masked; or, where `special_ids` is
    None, that of the labels, as of a causal model that predicts the ends of documents as well.

    No random number is drawn and the model's mode is restored, so training goes on as if nothing had happened.

    Raises:
        ValueError: not one token of the rows is to be predicted.
    """
    was_training = model.training
    model.eval()
    loss = correct = labels = 0.0
    counts = torch.zeros(model.config.vocab_size, dtype=torch.float64)  # float64 holds every count exactly
    length = 0
    for begin in range(rank * batch_size, len(keys), world_size * batch_size):
        batch = collate_rows([dataset[key] for key in keys[begin : begin + batch_size]])
        targets = batch["labels"][batch["labels"] != IGNORED]
        original = torch.where(batch["labels"] != IGNORED, batch["labels"], batch["input_ids"])
        counted = original.flatten() if special_ids is not None else targets
        counts += torch.bincount(counted, minlength=len(counts))
        length = original.shape[1]
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = labelled_logits(model, inputs, inputs.pop("labels"))
        targets = targets.to(device)
        loss += nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        correct += (logits.argmax(-1) == targets).sum().item()
        labels += len(targets)
    model.train(was_training)

    counts[list(special_ids or ())] = 0
    totals = torch.cat([torch.tensor([loss, correct, labels], dtype=torch.float64), counts])
    if world_size > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
        dist.all_reduce(lengths := torch.tensor(length, device=device), op=dist.ReduceOp.MAX)
        length = int(lengths)
    loss, correct, labels = totals[:3].tolist()
    if not labels:
        raise ValueError(f"not one token of the {len(keys)} held-out rows is to be predicted: hold out more text.")
    mean = loss / labels
    return HeldOut(
        length=length,
        loss=mean,
        perplexity=math.exp(mean) if mean < LARGEST_EXPONENT else math.inf,
        accuracy=correct / labels,
        unigram_entropy=unigram_entropy(totals[3:].cpu().numpy()),
        labels=int(labels),
    )
