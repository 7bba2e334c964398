"""Tables and GLUE folders of generated sentences, and a fine-tuning run on them that takes a second."""

import random
from pathlib import Path
from typing import Any

from tiny_models import sentence, write_mabert

from mabert.training.finetune import FinetuneConfig


def has_cat(text: str) -> str:
    """The label of a sentence: a question that a tiny model can learn to answer."""
    return "cat" if "cat" in text.split() else "other"


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of sentences."""
    rng = random.Random(seed)
    return [(sentence(rng), sentence(rng)) for _ in range(count)]


def write_table(path: Path, count: int, seed: int, of: str = "first") -> Path:
    """Columns `text`, `second`, `label` (of one of the two) and `cats`, a number."""
    lines = ["text\tsecond\tlabel\tcats"]
    for first, second in rows(count, seed):
        lines.append(f"{first}\t{second}\t{has_cat(first if of == 'first' else second)}\t{first.split().count('cat')}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_glue(folder: Path) -> Path:
    """RTE and MNLI in the official layout, a few rows each."""
    sets = {
        "RTE": (("train", "dev"), "sentence1\tsentence2\tlabel", ("entailment", "not_entailment")),
        "MNLI": (
            ("train", "dev_matched", "dev_mismatched"),
            "sentence1\tsentence2\tgold_label",
            ("neutral", "entailment", "contradiction"),
        ),
    }
    for task, (splits, header, labels) in sets.items():
        (folder / task).mkdir(parents=True)
        for seed, split in enumerate(splits):
            body = [f"{i}\t{a}\t{b}\t{labels[i % len(labels)]}" for i, (a, b) in enumerate(rows(24, seed))]
            (folder / task / f"{split}.tsv").write_text("\n".join([f"index\t{header}", *body]) + "\n")
    return folder


def prepare(folder: Path) -> Path:
    """A folder with `mlm`, a pretrained model, and the tables `train.tsv` and `dev.tsv`."""
    write_mabert(folder / "mlm")
    write_table(folder / "train.tsv", 400, seed=0)
    write_table(folder / "dev.tsv", 80, seed=1)
    return folder


def config(folder: Path, output: Path, **changes: Any) -> FinetuneConfig:
    """A run of 3 steps on the tables of `prepare`."""
    few_steps = {"max_length": 32, "max_train_rows": 96, "epochs": 1, "learning_rate": 5e-3}
    tables = {} if "task" in changes else {"train": folder / "train.tsv", "dev": folder / "dev.tsv"}
    return FinetuneConfig(**({"model": folder / "mlm", "output": output} | tables | few_steps | changes))
