"""The cells that pretrain an architecture at a scale."""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import SAFE_WEIGHTS_NAME

from mabert.experiments.architectures import architecture, encoder_parameters
from mabert.experiments.cells import Cell
from mabert.experiments.finetuning import Checkpoint
from mabert.experiments.sources import Sources
from mabert.files import digest
from mabert.training.callbacks import read_lines
from mabert.training.checkpoints import list_checkpoints
from mabert.training.optim import plan_schedule
from mabert.training.pretrain import EVALUATION_LOG, PretrainConfig, pretrain

EVALUATIONS = 15  # points of a loss curve


@dataclass(frozen=True)
class Pretraining:
    """Pretrains architectures on the common text, all by the same recipe."""

    sources: Sources
    work: Path
    console: Console

    def cell(self, name: str, budget: float = 1.0, seed: int = 0) -> Cell:
        """An architecture pretrained for a share of the scale's steps; it leaves the model's folder in `work`."""
        scale, text = self.sources.scale, self.sources.cell()
        choices = {
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
        }
        folder = self._folder(name, budget, seed)
        return Cell(
            name=f"pretraining/{name}{at(budget)}/{seed}",
            config={
                "architecture": name,
                "size": scale.model_size(),
                "match_parameters": scale.match_parameters,
                "text": text.config,
                **choices,
            },
            run=partial(self._run, name, choices, folder),
            needs=(text,),
            artifact=folder / "config.json",
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

    def _run(self, name: str, choices: dict[str, Any], folder: Path) -> dict[str, Any]:
        scale, model = self.sources.scale, architecture(name, self.sources.scale, self.sources.vocabulary())
        steps = plan_schedule(scale.steps, budget=choices["budget"]).steps
        result = pretrain(
            PretrainConfig(
                **choices,
                model=model,
                train=self.sources.texts("train"),
                valid=self.sources.texts("valid"),
                tokenizer=self.sources.tokenizer,
                shards=self.sources.shards,
                output=folder,
                micro_batch_size=scale.micro_batch_size,
                eval_every=max(1, steps // EVALUATIONS),
                checkpoint_every=max(1, min(1_000, steps // 5)),
                workers=0,
                tensorboard=False,
            ),
            console=self.console,
        )
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        values = asdict(result)
        for elsewhere in ("output", "held_out_loss", "perplexity", "masked_accuracy", "unigram_entropy"):
            del values[elsewhere]
        return values | {
            "encoder_parameters": encoder_parameters(model),
            "weights": digest(folder / SAFE_WEIGHTS_NAME),
            "evaluations": read_lines(folder / EVALUATION_LOG),
            "model": json.loads(model.to_json_string(use_diff=True)),
        }


def at(budget: float) -> str:
    """The part of a cell's name that tells the budget; none for the whole."""
    return "" if budget == 1 else f"@{100 * budget:g}"
