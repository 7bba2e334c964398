"""The GLUE runner: any model folders on the tasks of a scale, several seeds each, compared with the first of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from mabert.data.tokenizer import tokenizer_hash
from mabert.experiments.cells import Cell
from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.finetuning import Checkpoint, Contender, Finetuning, main_metric
from mabert.files import digest
from mabert.inference.loading import ModelFolderError, load_config, load_matching_tokenizer


def checkpoints_of(folders: Sequence[Path]) -> list[Checkpoint]:
    """Model folders as checkpoints, named after their folders; told apart by what is in the folders.

    Raises:
        ModelFolderError: a folder holds no model, or two of them have one name.
    """
    found: dict[str, Checkpoint] = {}
    for folder in folders:
        tokenizer = load_matching_tokenizer(folder, load_config(folder))
        name = folder.resolve().name
        if name in found:
            raise ModelFolderError(f"{found[name].folder} and {folder} have one name: rename a folder, or link to it.")
        weights = folder / SAFE_WEIGHTS_NAME
        if not weights.is_file():
            raise ModelFolderError(f"{folder} has no {SAFE_WEIGHTS_NAME}: save the model with save_pretrained.")
        parts = {"weights": digest(weights), "config": digest(folder / CONFIG_NAME)}
        found[name] = Checkpoint(name, 0, folder, {"model": name, **parts, "tokenizer": tokenizer_hash(tokenizer)})
    return list(found.values())


def glue_cells(finetuning: Finetuning, checkpoints: Sequence[Checkpoint]) -> list[Cell]:
    """All runs of each model, and the first model's comparison with each other one."""
    cells = [cell for checkpoint in checkpoints for cell in finetuning.scores([checkpoint])]
    for other in checkpoints[1:]:
        cells += [_comparison(finetuning, checkpoints[0], other, task) for task in finetuning.sources.tasks]
    return cells


def _comparison(finetuning: Finetuning, one: Checkpoint, other: Checkpoint, task: str) -> Cell:
    return finetuning.comparison(Contender([one]), Contender([other]), task)


def about_scores(finetuning: Finetuning, checkpoints: Sequence[Checkpoint]) -> str:
    """What the table's numbers are, in a sentence or two."""
    seeds = finetuning.sources.scale.finetuning_seeds
    spread = "mean ± standard deviation over" if seeds > 1 else "of"
    said = f"Scores: {spread} {seeds} fine-tuning seed{'s' * (seeds > 1)}, one pretrained model each."
    if len(checkpoints) > 1:
        said += " Differences: with their 95% interval, by paired bootstrap over those seeds and the rows."
    return said


def score_table(finetuning: Finetuning, checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[str, ...]]:
    """A header, then a row for each dev set: the main metric of each model, mean ± standard deviation over the seeds;
    and the difference between the first model and each other one with its confidence interval."""
    first = checkpoints[0].name
    differences = [f"{first} - {other.name}" for other in checkpoints[1:]]
    yield ("dev set", "metric", *(checkpoint.name for checkpoint in checkpoints), *differences)
    for task in finetuning.sources.tasks:
        runs = [[finetuning.store.read(cell) for cell in finetuning.runs([model], task)] for model in checkpoints]
        compared = [
            finetuning.store.read(_comparison(finetuning, checkpoints[0], other, task)) for other in checkpoints[1:]
        ]
        metric = main_metric(task)
        for split, example in runs[0][0]["splits"].items():
            scores = [[run["splits"][split]["metrics"][metric] for run in model] for model in runs]
            yield (
                " ".join(filter(None, (task, split, example["subset"]))),
                metric,
                *(shown(values) for values in scores),
                *(
                    f"{result['difference']:+.3f} ({result['low']:+.3f} to {result['high']:+.3f})"
                    for result in (comparison["splits"][split] for comparison in compared)
                ),
            )


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation; of a single value no deviation."""
    mean, deviation = mean_and_spread(values)
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"
