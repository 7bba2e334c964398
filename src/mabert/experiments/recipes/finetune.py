"""Fine-tuning recipes. Each returns one complete config; `key=value` on the command line changes any field of it.

mabert finetune glue task=RTE glue=glue/ model=runs/tiny output=runs/rte
"""

from pathlib import Path

from mabert.training.finetune_config import FinetuneConfig


def glue(task: str, glue: Path, model: Path, output: Path) -> FinetuneConfig:
    """One of the eight GLUE tasks by its name, from a folder in the official layout.

    Command: mabert finetune glue task=RTE glue=glue/ model=runs/tiny output=runs/rte
    Duration: unmeasured. Expected score: not measured yet.
    """
    return FinetuneConfig(task=task, glue=glue, model=model, output=output)


def table(train: Path, model: Path, output: Path) -> FinetuneConfig:
    """A table of your own, `.tsv .csv .jsonl .parquet`, with one or two text columns and a label column.

    Command: mabert finetune table train=train.tsv model=runs/tiny output=runs/mine text_column=sentence
    Duration: unmeasured. Expected score: that of your task.
    """
    return FinetuneConfig(train=train, model=model, output=output)


RECIPES = {recipe.__name__: recipe for recipe in (glue, table)}
