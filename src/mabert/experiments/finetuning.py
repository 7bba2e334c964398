"""The cells that fine-tune and score a checkpoint: the choice of hyperparameters, the runs, and paired comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers.utils import SAFE_WEIGHTS_NAME

from mabert.data.glue import GLUE_TASKS
from mabert.experiments.cells import Cell, CellStore
from mabert.experiments.comparison import paired_comparison
from mabert.experiments.sources import GENERATED_TASK, Sources
from mabert.files import digest
from mabert.training.finetune import FinetuneConfig, FinetuneResult, finetune

# CHOICE: of a task with two metrics the one that the paper gives
MAIN_METRIC = {task: "f1" if "f1" in spec.metrics else spec.metrics[0] for task, spec in GLUE_TASKS.items()} | {
    GENERATED_TASK: "accuracy"
}

Variant = Mapping[str, str] | None
"""`psm` and `pooling` of an ablation, or None for the model as it is."""


def main_metric(task: str) -> str:
    """Name of the metric that a task is compared by."""
    return MAIN_METRIC[task]


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model that is fine-tuned."""

    name: str
    seed: int
    """Of its pretraining."""
    folder: Path
    config: dict[str, Any]
    """What tells it from another one of that name."""
    needs: tuple[Cell, ...] = ()
    """The cell that makes it."""

    def weights(self) -> str:
        """Digest of its weights, which tells it from one that was trained again by the same choices."""
        return digest(self.folder / SAFE_WEIGHTS_NAME)


@dataclass(frozen=True)
class Contender:
    """What is set beside something else: an architecture, perhaps as a variant."""

    checkpoints: Sequence[Checkpoint]
    """One for each pretraining seed."""
    variant: Variant = None

    @property
    def name(self) -> str:
        """As in the names of its cells."""
        return f"{self.checkpoints[0].name}{suffix(self.variant)}"


@dataclass(frozen=True)
class Finetuning:
    """Fine-tunes checkpoints on the tasks of `sources`, by the grid and the seeds of its scale."""

    sources: Sources
    store: CellStore
    console: Console

    def scores(self, checkpoints: Sequence[Checkpoint], variant: Variant = None) -> Iterator[Cell]:
        """Every run of an architecture's checkpoints, one for each pretraining seed: all tasks, all seeds."""
        for task in self.sources.tasks:
            yield from self.runs(checkpoints, task, variant)

    def runs(self, checkpoints: Sequence[Checkpoint], task: str, variant: Variant = None) -> list[Cell]:
        """One for each pair of a pretraining and a fine-tuning seed."""
        seeds = range(self.sources.scale.finetuning_seeds)
        return [self.run(checkpoint, task, seed, variant) for checkpoint in checkpoints for seed in seeds]

    def tuning(self, checkpoint: Checkpoint, task: str) -> Cell:
        """The point of the grid that scores best on a part of train; the dev set is not read."""
        scale = self.sources.scale
        grid = [
            dict(zip(("learning_rate", "batch_size", "epochs"), point, strict=True))
            for point in product(scale.learning_rates, scale.batch_sizes, scale.epochs)
        ]
        return Cell(
            name=f"tuning/{checkpoint.name}/{checkpoint.seed}/{task}",
            config=self._config(checkpoint, task) | {"grid": grid},
            run=partial(self._tune, checkpoint, task, grid),
            needs=checkpoint.needs,
            scratch=self._output(checkpoint, f"{task}-grid"),
        )

    def run(self, checkpoint: Checkpoint, task: str, seed: int, variant: Variant = None) -> Cell:
        """One run on the whole of train, scored on dev; a variant acts in padded execution, on rows of one length."""
        tuning = self.tuning(checkpoint, task)
        return Cell(
            name=f"finetuning/{checkpoint.name}{suffix(variant)}/{checkpoint.seed}/{task}/{seed}",
            config=tuning.config | {"seed": seed, "variant": variant},
            run=partial(self._run, checkpoint, tuning, task, seed, variant),
            needs=(*checkpoint.needs, tuning),
            scratch=self._output(checkpoint, f"{task}{suffix(variant)}-{seed}"),  # a model that nobody needs again
        )

    def comparison(self, one: Contender, other: Contender, task: str) -> Cell:
        """How much better one is than another, with a confidence interval over seeds and rows."""
        ones, others = self.runs(one.checkpoints, task, one.variant), self.runs(other.checkpoints, task, other.variant)
        return Cell(
            name=f"comparisons/{one.name}--{other.name}/{task}",
            config={"runs": [cell.config for cell in (*ones, *others)], "metric": main_metric(task)},
            run=partial(self._compare, ones, others, task, len(one.checkpoints)),
            needs=(*ones, *others),
        )

    def _config(self, checkpoint: Checkpoint, task: str) -> dict[str, Any]:
        scale = self.sources.scale
        return {
            "checkpoint": checkpoint.config,
            "task": task,
            "data": self.sources.task_identity(task),
            "max_train_rows": scale.max_train_rows,
            "max_length": scale.max_length,
            "bf16": scale.bf16,
        }

    def _train(self, checkpoint: Checkpoint, task: str, output: Path, choices: Mapping[str, Any]) -> FinetuneResult:
        scale = self.sources.scale
        return finetune(
            FinetuneConfig(
                **self.sources.task_choices(task),
                **choices,
                model=checkpoint.folder,
                output=output,
                max_train_rows=scale.max_train_rows,
                max_length=scale.max_length,
                bf16=scale.bf16,
            ),
            console=self.console,
        )

    def _output(self, checkpoint: Checkpoint, name: str) -> Path:
        return self.store.work / "finetuning" / checkpoint.name / str(checkpoint.seed) / name

    def _tune(self, checkpoint: Checkpoint, task: str, grid: list[dict[str, Any]]) -> dict[str, Any]:
        tried = []
        for number, point in enumerate(grid if len(grid) > 1 else []):
            output = self._output(checkpoint, f"{task}-grid") / str(number)
            result = self._train(checkpoint, task, output, point | {"dev_from_train": True})
            (split,) = result.splits.values()
            tried.append(point | {"metrics": split.metrics, "rows_held_out": split.rows})
        if not tried:
            return {"choice": grid[0], "tried": [], "weights": checkpoint.weights()}
        best = max(tried, key=lambda point: point["metrics"][main_metric(task)])
        return {"choice": {name: best[name] for name in grid[0]}, "tried": tried, "weights": checkpoint.weights()}

    def _run(self, checkpoint: Checkpoint, tuning: Cell, task: str, seed: int, variant: Variant) -> dict[str, Any]:
        choice = self.store.read(tuning)["choice"]
        padded = {} if variant is None else {**variant, "execution": "padded", "pad_to_max_length": True}
        output = self._output(checkpoint, f"{task}{suffix(variant)}-{seed}")
        result = self._train(checkpoint, task, output, choice | padded | {"seed": seed})
        return {
            "choice": choice,
            "weights": checkpoint.weights(),
            "splits": {name: asdict(split) for name, split in result.splits.items()},
            "predictions": {name: _predictions(output / f"predictions-{name}.tsv") for name in result.splits},
            **{
                name: getattr(result, name)
                for name in ("train_rows", "train_subset", "steps", "seconds", "environment")
            },
        }

    def _compare(self, ones: list[Cell], others: list[Cell], task: str, pretrained: int) -> dict[str, Any]:
        def predictions(cells: list[Cell], split: str) -> np.ndarray:
            return np.array([[int(digit) for digit in self.store.read(cell)["predictions"][split]] for cell in cells])

        return {
            "splits": {
                split: paired_comparison(
                    np.array(gold),
                    predictions(ones, split),
                    predictions(others, split),
                    main_metric(task),
                    pretrained=pretrained,
                )
                for split, gold in self.sources.gold(task).items()
            }
        }


def suffix(variant: Variant) -> str:
    """The part of a cell's name that tells the variant."""
    return "" if variant is None else "~" + ",".join(f"{name}={value}" for name, value in variant.items())


def _predictions(path: Path) -> str:
    """The predicted class of every row, one digit each."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    names = [column[2:-1] for column in header.split("\t")[3:]]  # p(<label>)
    return "".join(str(names.index(line.split("\t")[2])) for line in lines)
