"""Recall: every architecture trained on each kind of task; asked by length, number and place of facts, and probed.

After arXiv 2510.26912, of which the questions are known and not the settings.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from mabert.data.recall import PLACES, RecallTask
from mabert.experiments.architectures import Vocabulary, encoder_parameters
from mabert.experiments.causal_architectures import HYBRIDS, causal_architecture
from mabert.experiments.cells import Cell
from mabert.experiments.scales import Scale
from mabert.models.causal import MEMORIES
from mabert.training.callbacks import say
from mabert.training.recall import EVALUATION_SEED, RecallRun, evaluate_recall, train_recall

SIZE = ("hidden_size", "num_attention_heads", "intermediate_size", "layers", "state_size", "ssm", "sliding_window")
GUESSED_ROWS = 1_000
TOKENS_AT_ONCE = 2**14


@dataclass(frozen=True)
class Recall:
    """The cells of one scale."""

    scale: Scale
    console: Console
    work: Path

    def cells(self) -> Iterator[Cell]:
        """Every kind, architecture and seed."""
        recall = self.scale.recall
        for kind in recall.kinds:
            for seed in range(recall.seeds):
                for name in HYBRIDS:
                    yield self.cell(name, kind, seed)

    def cell(self, name: str, kind: str, seed: int) -> Cell:
        """One model, trained on a kind of task at every length and number of facts, then asked and probed at each; and
        asked in rows that are longer."""
        recall = self.scale.recall
        run = replace(recall.run(seed), bf16=self.scale.bf16 and torch.cuda.is_available())
        scratch = self.work / "recall" / name / kind / str(seed)
        return Cell(
            name=f"recall/{name}/{kind}/{seed}",
            config={
                "architecture": name,
                "size": {field: getattr(recall, field) for field in SIZE},
                "tasks": [asdict(task) for task in recall.tasks(kind)],
                "beyond": recall.beyond,
                "run": asdict(run),
                "eval_rows": recall.eval_rows,
            },
            run=partial(self._run, name, kind, run, scratch / "training.pt"),
            scratch=scratch,
        )

    def _run(self, name: str, kind: str, run: RecallRun, checkpoint: Path) -> dict[str, Any]:
        recall = self.scale.recall
        config = causal_architecture(
            name,
            recall,
            Vocabulary(recall.vocab_size),
            state_size=recall.state_size,
            ssm=recall.ssm,
            sliding_window=recall.sliding_window,
        )
        set_seed(run.seed)
        model = AutoModelForCausalLM.from_config(config)
        training = train_recall(model, recall.tasks(kind), run, partial(say, self.console), checkpoint=checkpoint)
        return {
            "parameters": model.num_parameters(),
            "encoder_parameters": encoder_parameters(config),
            "lessons": [asdict(lesson) for lesson in training.lessons],
            "taught": training.taught,
            "losses": training.losses[:: max(1, len(training.losses) // 50)],
            "asked": [self._asked(model, task) for task in recall.asked(kind)],
        }

    def _asked(self, model: PreTrainedModel, task: RecallTask) -> dict[str, Any]:
        def right(task: RecallTask, memories: str) -> float:
            batch_size = max(1, TOKENS_AT_ONCE // task.length)
            rows = self.scale.recall.eval_rows
            return evaluate_recall(model, task, rows, memories=memories, batch_size=batch_size).accuracy

        accuracy = {place: right(replace(task, place=place), "both") for place in PLACES}
        probes = {memories: right(task, memories) for memories in MEMORIES if memories != "both"}
        return {
            "length": task.length,
            "pairs": task.pairs,
            "guessing": task.guessing(GUESSED_ROWS, EVALUATION_SEED),
            "accuracy": accuracy,
            "probes": {"both": accuracy[task.place]} | probes,
        }
