"""What the optimizer does to each parameter, and when: weight-decay groups, Adam, warm-up, stages and budgets."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

BUDGET_MODES = ("own", "truncate")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the trainable parameters into two optimizer groups: with weight decay, and without.

    Biases, every norm's parameters, A_log, D and the scales of two branches are not decayed. A tied parameter is listed
    once; frozen ones are left out.
    """
    decayed: dict[nn.Parameter, None] = {}
    exempt: dict[nn.Parameter, None] = {}
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            # CHOICE: A_log and D set the recurrence's time scales and skip, decay would pull them to 1 (Mamba-1), and
            # the weights of two branches to 0; embeddings are decayed, as in BERT.
            if is_norm or name.endswith(("bias", "_scale")) or name in ("A_log", "D"):
                exempt[parameter] = None
            else:
                decayed[parameter] = None
    return [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(exempt), "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay over `parameter_groups`; the defaults are RoBERTa-base's."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """When the learning rate and the sequence length change, in optimizer steps counted from 0."""

    steps: int
    """Steps taken in all."""
    decay_steps: int
    """Step at which the learning rate has decayed; later than `steps` where the run is a truncated one."""
    warmup_steps: int
    """Steps of the linear warm-up."""
    stage_ends: tuple[int, ...]
    """For each stage, the first step that no longer belongs to it; the last entry is `steps`."""

    @property
    def stage_steps(self) -> tuple[int, ...]:
        """Steps taken in each stage; zero for a stage that a truncated run does not reach."""
        return tuple(end - begin for begin, end in pairwise((0, *self.stage_ends)))

    def stage_at(self, step: int) -> int:
        """Index of the stage that `step` belongs to."""
        return bisect_right(self.stage_ends, step)


def plan_schedule(
    total_steps: int,
    *,
    budget: float = 1.0,
    budget_mode: str = "own",
    stage_fractions: Sequence[float] = (0.9, 0.1),
    warmup_fraction: float = 0.024,
) -> Schedule:
    """Lay out a run that spends `budget` (a share) of `total_steps`.

    `budget_mode="own"` gives the budget a schedule of its own: the same split into stages, the same share of warm-up,
    decay to zero at its end. `"truncate"` takes the full run's schedule and stops it at the budget's step.
    """
    if budget_mode not in BUDGET_MODES:
        raise ValueError(f"budget_mode={budget_mode!r} is not one of {', '.join(map(repr, BUDGET_MODES))}.")
    steps = max(1, round(total_steps * budget))
    # CHOICE: the paper says both "truncating" and "the same length schedule": by default each budget is its own run
    horizon = steps if budget_mode == "own" else total_steps
    ends = [round(horizon * share) for share in accumulate(stage_fractions)]
    ends[-1] = horizon
    return Schedule(
        steps=steps,
        decay_steps=horizon,
        warmup_steps=round(horizon * warmup_fraction),
        stage_ends=tuple(min(end, steps) for end in ends),
    )
