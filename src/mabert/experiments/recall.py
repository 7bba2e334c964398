"""Recall: every architecture trained on each task and length, asked by place of the facts, and probed.

After arXiv 2510.26912, of which the questions are known and not the settings.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, set_seed

from mabert.data.recall import PLACES, RecallTask
from mabert.experiments.architectures import Vocabulary, encoder_parameters
from mabert.experiments.causal_architectures import HYBRIDS, causal_architecture
from mabert.experiments.cells import Cell
from mabert.experiments.scales import Scale
from mabert.models.causal import MEMORIES
from mabert.training.recall import RecallRun, evaluate_recall, train_recall

SIZE = ("hidden_size", "num_attention_heads", "intermediate_size", "layers")


@dataclass(frozen=True)
class Recall:
    """The cells of one scale."""

    scale: Scale
    console: Console

    def cells(self) -> Iterator[Cell]:
        """Every kind, length, architecture and seed."""
        recall = self.scale.recall
        for kind, task in recall.settings():
            for seed in range(recall.seeds):
                for name in HYBRIDS:
                    yield self.cell(name, kind, task, seed)

    def cell(self, name: str, kind: str, task: RecallTask, seed: int) -> Cell:
        """One model trained on one task, asked and probed; `kind` is what the cells call it at every length."""
        recall = self.scale.recall
        run = RecallRun(
            steps=recall.steps,
            batch_size=recall.batch_size,
            learning_rate=recall.learning_rate,
            seed=seed,
            bf16=torch.cuda.is_available(),
        )
        return Cell(
            name=f"recall/{name}/{kind}/{task.length}/{seed}",
            config={
                "architecture": name,
                "size": {field: getattr(recall, field) for field in SIZE},
                "task": asdict(task),
                "run": asdict(run),
                "eval_rows": recall.eval_rows,
            },
            run=partial(self._run, name, task, run),
        )

    def _run(self, name: str, task: RecallTask, run: RecallRun) -> dict[str, Any]:
        recall = self.scale.recall
        config = causal_architecture(name, recall, Vocabulary(recall.vocab_size), longest=task.length)
        set_seed(run.seed)
        model = AutoModelForCausalLM.from_config(config)

        def say(line: str) -> None:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)

        losses = train_recall(model, task, run, say)
        rows = recall.eval_rows
        return {
            "parameters": model.num_parameters(),
            "encoder_parameters": encoder_parameters(config),
            "accuracy": {place: evaluate_recall(model, replace(task, place=place), rows).accuracy for place in PLACES},
            "probes": {
                memories: evaluate_recall(model, task, rows, memories=memories).accuracy for memories in MEMORIES
            },
            "losses": losses[:: max(1, len(losses) // 50)],
            "final_loss": sum(losses[-20:]) / len(losses[-20:]),
        }
