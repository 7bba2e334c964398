"""The cells that pretrain a model at a scale."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from mabert.experiments.architectures import LONGFORMER_GLOBAL, Vocabulary, architecture, encoder_parameters
from mabert.experiments.cells import Cell
from mabert.experiments.finetuning import Checkpoint
from mabert.experiments.sources import Sources
from mabert.files import atomic_write, digest
from mabert.training.callbacks import read_lines
from mabert.training.checkpoints import list_checkpoints
from mabert.training.optim import plan_schedule
from mabert.training.pretrain import EVALUATION_LOG, PretrainConfig, pretrain

EVALUATIONS = 15  # points of a loss curve


@dataclass(frozen=True)
class Pretraining:
    """Pretrains encoders on the common text, all by the same recipe."""

    sources: Sources
    work: Path
    console: Console

    def cell(self, name: str, budget: float = 1.0, seed: int = 0) -> Cell:
        """An architecture pretrained for a share of the scale's steps; it leaves the model's folder in `work`."""
        scale = self.sources.scale
        return pretraining_cell(
            self.sources,
            f"pretraining/{name}{at(budget)}/{seed}",
            {"architecture": name, "size": scale.model_size(), "match_parameters": scale.match_parameters},
            {
                "steps": scale.steps,
                "budget": budget,
                "batch_size": scale.batch_size,
                "stage_lengths": scale.stage_lengths,
                "stage_fractions": scale.stage_fractions,
                "learning_rate": scale.learning_rate,
                "warmup_fraction": scale.warmup_fraction,
                "bf16": scale.bf16,
                "eval_rows": scale.eval_rows,
                "seed": seed,
                # a row is one sequence: all architectures read the same rows, and most cannot tell sequences apart
                "packing": "full-sentences",
            },
            partial(architecture, name, scale),
            self._folder(name, budget, seed),
            scale.micro_batch_size,
            self.console,
        )

    def checkpoint(self, name: str, budget: float = 1.0, seed: int = 0) -> Checkpoint:
        """What the cell leaves, to fine-tune."""
        cell = self.cell(name, budget, seed)
        return Checkpoint(f"{name}{at(budget)}", seed, self._folder(name, budget, seed), cell.config, (cell,))

    def checkpoints(self, name: str, budget: float = 1.0) -> list[Checkpoint]:
        """One for each pretraining seed."""
        return [self.checkpoint(name, budget, seed) for seed in range(self.sources.scale.pretraining_seeds)]

    def _folder(self, name: str, budget: float, seed: int) -> Path:
        return self.work / "pretraining" / f"{name}{at(budget)}" / str(seed)


def pretraining_cell(
    sources: Sources,
    name: str,
    identity: dict[str, Any],
    choices: dict[str, Any],
    model: Callable[[Vocabulary], PreTrainedConfig],
    folder: Path,
    micro_batch_size: int,
    console: Console,
) -> Cell:
    """A cell that pretrains a language model on the text of `sources` and leaves it in `folder`.

    Args:
        name: of the cell.
        identity: what the cell's config says of the model.
        choices: fields of `PretrainConfig`.
        model: makes the model's config, when the tokenizer is there.
    """
    text = sources.cell()

    def run() -> dict[str, Any]:
        made = model(sources.vocabulary())
        steps = plan_schedule(choices["steps"], budget=choices.get("budget", 1.0)).steps
        result = pretrain(
            PretrainConfig(
                **choices,
                model=made,
                train=sources.texts("train"),
                valid=sources.texts("valid"),
                tokenizer=sources.tokenizer,
                shards=sources.shards,
                output=folder,
                micro_batch_size=micro_batch_size,
                eval_every=max(1, steps // EVALUATIONS),
                checkpoint_every=max(1, min(1_000, steps // 5)),
                workers=0,
                tensorboard=False,
            ),
            console=console,
        )
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        copy_local_to_global(folder / SAFE_WEIGHTS_NAME)
        values = asdict(result)
        for elsewhere in ("output", "held_out_loss", "perplexity", "accuracy", "unigram_entropy"):
            del values[elsewhere]
        return values | {
            "encoder_parameters": encoder_parameters(made),
            "weights": digest(folder / SAFE_WEIGHTS_NAME),
            "evaluations": read_lines(folder / EVALUATION_LOG),
            "model": json.loads(made.to_json_string(use_diff=True)),
        }

    config = identity | {"text": text.config, **choices}
    return Cell(name, config, run, needs=(text,), artifact=folder / CONFIG_NAME)


def copy_local_to_global(weights: Path) -> None:
    """Give Longformer's projections for tokens that attend globally the values of the local ones, as its published
    checkpoint began: no token of masked language modelling attends globally, and [CLS] of a classifier does.
    """
    with safe_open(weights, "pt") as file:
        untrained = [name for name in file.keys() if LONGFORMER_GLOBAL in name]  # noqa: SIM118  (no mapping)
    if untrained:
        tensors = load_file(weights)
        tensors |= {name: tensors[name.replace(LONGFORMER_GLOBAL, ".")].clone() for name in untrained}
        with atomic_write(weights) as file:
            file.write(save(tensors, metadata={"format": "pt"}))


def at(budget: float) -> str:
    """The part of a cell's name that tells the budget; none for the whole."""
    return "" if budget == 1 else f"@{100 * budget:g}"
