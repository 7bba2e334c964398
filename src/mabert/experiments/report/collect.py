"""What the cells of a scale say: their files, the scores in them, and the statistics over seeds."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.finetuning import main_metric
from mabert.experiments.pretraining import at
from mabert.experiments.scales import SCALES, Scale
from mabert.experiments.sources import GENERATED_TASK

NOTE = "NOTE.txt"

Models = Sequence[tuple[str, str]]
"""(how it is called, the name it has in its cells) of each row."""


@dataclass(frozen=True)
class Record:
    """One cell's file."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    stamp: dict[str, Any]

    @property
    def hardware(self) -> dict[str, Any]:
        """What it was computed on; a process of its own had its own number of threads."""
        threads = {"threads": self.result["threads"]} if "threads" in self.result else {}
        return self.stamp["hardware"] | threads

    def at(self, *keys: str) -> Any:
        """What stands in the result under these keys, one inside the other.

        Raises:
            ValueError: the result has no such thing.
        """
        found: Any = self.result
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                raise ValueError(
                    f"{self.path}: its result has no {' > '.join(keys)}. Delete it and run its cell again."
                )
            found = found[key]
        return found


@dataclass(frozen=True)
class Measured:
    """One number of several cells."""

    names: tuple[str, ...]
    """The cells that it should come from."""
    values: tuple[float, ...]
    """One of each cell that is there."""

    @property
    def is_complete(self) -> bool:
        """Whether no cell is missing."""
        return len(self.values) == len(self.names) > 0

    @property
    def mean_and_spread(self) -> tuple[float, float | None]:
        """Mean and sample standard deviation, which a single cell does not have."""
        return mean_and_spread(self.values)


@dataclass(frozen=True)
class Score:
    """A column of the paper's tables: a dev set of a task, scored by its main metric."""

    title: str
    task: str
    split: str = "dev"

    @property
    def is_glue(self) -> bool:
        """Whether the paper has it."""
        return self.task != GENERATED_TASK

    @property
    def metric(self) -> str:
        """What it is scored by."""
        return main_metric(self.task)


SCORES = (
    Score("CoLA", "CoLA"),
    Score("SST-2", "SST-2"),
    Score("MRPC", "MRPC"),
    Score("QQP", "QQP"),
    Score("MNLI-m", "MNLI", "dev_matched"),
    Score("MNLI-mm", "MNLI", "dev_mismatched"),
    Score("QNLI", "QNLI"),
    Score("RTE", "RTE"),
    Score(GENERATED_TASK, GENERATED_TASK),
)
"""The paper's eight, and that of the generated task."""


def model_name(architecture: str, budget: float = 1.0) -> str:
    """The name that a model pretrained for a share of the steps has in its cells."""
    return f"{architecture}{at(budget)}"


def budget_of(model: str) -> float:
    """The share of the steps that such a name tells."""
    _, _, percent = model.partition("~")[0].partition("@")
    return float(percent) / 100 if percent else 1.0


@dataclass(frozen=True)
class Results:
    """All cells of one scale."""

    scale: Scale
    records: dict[str, Record]
    notes: dict[str, str] = field(default_factory=dict)
    """What has to be said of all cells of a folder, by its name: the text of its `NOTE`."""

    @cached_property
    def _by_kind(self) -> dict[str, dict[tuple[str, ...], Record]]:
        kinds: dict[str, dict[tuple[str, ...], Record]] = {}
        for name, record in self.records.items():
            kind, *rest = name.split("/")
            kinds.setdefault(kind, {})[tuple(rest)] = record
        return kinds

    def of(self, kind: str) -> dict[tuple[str, ...], Record]:
        """The cells of one kind, by the parts of their names behind it."""
        return self._by_kind.get(kind, {})

    def found(self, names: Iterable[str]) -> list[Record]:
        """The cells that are there."""
        return [self.records[name] for name in names if name in self.records]

    def measure(self, names: Sequence[str], value: Callable[[Record], float]) -> Measured:
        """One number of each of these cells."""
        return Measured(tuple(names), tuple(value(record) for record in self.found(names)))

    def scores(self) -> list[Score]:
        """The columns for which any model was fine-tuned."""
        tasks = {task for _, _, task, _ in self.of("finetuning")}
        return [score for score in SCORES if score.task in tasks]

    def pretraining_seeds(self, model: str) -> list[int]:
        """Those with which a model was pretrained, or fine-tuned since."""
        kinds = (self.of("pretraining"), self.of("finetuning"))
        return sorted({int(name[1]) for kind in kinds for name in kind if name[0] == model} or {0})

    def finetuning_seeds(self) -> list[int]:
        """Those of any model: what one lacks of them is missing."""
        return sorted({int(seed) for *_, seed in self.of("finetuning")})

    def pretrainings(self, model: str) -> list[str]:
        """Names of the cells that pretrain a model, found or not."""
        return [f"pretraining/{model}/{seed}" for seed in self.pretraining_seeds(model)]

    def finetunings(self, model: str, task: str) -> list[str]:
        """Names of the cells that fine-tune a model, found or not."""
        return [
            f"finetuning/{model}/{pretraining}/{task}/{seed}"
            for pretraining in self.pretraining_seeds(model)
            for seed in self.finetuning_seeds()
        ]

    def score(self, model: str, score: Score) -> Measured:
        """A model's score over all seeds."""
        return self.measure(
            self.finetunings(model, score.task),
            lambda record: record.at("splits", score.split, "metrics", score.metric),
        )

    def average(self, model: str, scores: Sequence[Score]) -> Measured:
        """Mean of several scores, run by run; of none while a cell of any task is missing."""
        columns = [self.score(model, score) for score in scores]
        if not all(column.is_complete for column in columns):
            return Measured(columns[0].names, ())
        runs = zip(*(column.values for column in columns), strict=True)
        return Measured(columns[0].names, tuple(mean_and_spread(run)[0] for run in runs))

    def budgets(self) -> list[float]:
        """The shares of the steps after which any model was pretrained or fine-tuned, the smallest first."""
        models = {name[0] for kind in ("pretraining", "finetuning") for name in self.of(kind)}
        return sorted({budget_of(model) for model in models})

    def is_measured(self, model: str) -> bool:
        """Whether any cell pretrains or fine-tunes it."""
        return any(name[0] == model for kind in ("pretraining", "finetuning") for name in self.of(kind))


def read_results(folder: Path) -> list[Results]:
    """Read all cells of `folder`, which has one folder a scale, the largest scale first.

    Raises:
        ValueError: there is nothing, or a file or folder that is none of ours.
    """
    unknown = [path for path in sorted(folder.glob("*/")) if path.name not in SCALES and any(path.rglob("*.json"))]
    if unknown:
        raise ValueError(f"{unknown[0]}: there is no scale of that name. There are {', '.join(SCALES)}.")
    all_results = [
        Results(scale(), records, _read_notes(folder / name))
        for name, scale in reversed(SCALES.items())
        if (records := _read(folder / name))
    ]
    if not all_results:
        raise ValueError(
            f"{folder} holds no results. `mabert experiment all --scale tiny` makes some, in a folder called tiny."
        )
    return all_results


def _read(folder: Path) -> dict[str, Record]:
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.json"))}
    return {name: _record(path) for name, path in paths.items()}


def _read_notes(folder: Path) -> dict[str, str]:
    return {
        path.parent.relative_to(folder).as_posix(): " ".join(path.read_text(encoding="utf-8").split())
        for path in sorted(folder.rglob(NOTE))
    }


def _record(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Record(path, content["config"], content["result"], content["stamp"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the result of a cell ({type(error).__name__}: {error}). Delete it and run its cell again."
        ) from error
