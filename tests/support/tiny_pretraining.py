"""A pretraining run that takes seconds: generated text, a small vocabulary, a model of two layers."""

import random
from pathlib import Path

from mabert.data.shards import Shards, prepare_shards
from mabert.data.tokenizer import load_tokenizer, train_tokenizer
from mabert.training.callbacks import read_lines
from mabert.training.pretrain import PretrainConfig

MODEL = {"hidden_size": 16, "pattern": "MT", "num_attention_heads": 2, "intermediate_size": 32, "state_size": 4}
TRANSMAMBA = {
    "model_type": "transmamba",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "transpoints": [0, 5, 32],
}
LENGTHS = (16, 32)


def write_text(path: Path, documents: int = 120, seed: int = 0) -> None:
    """Sentences with a grammar that can be learnt from context: the verb agrees with its subject."""
    rng = random.Random(seed)
    nouns, places = ["cat", "dog", "bird", "fish", "horse"], ["house", "river", "garden", "street"]

    def sentence() -> str:
        plural = rng.random() < 0.5
        subject = rng.choice(nouns) + "s" * plural
        return f"the {subject} {'are' if plural else 'is'} in the {rng.choice(places)} ."

    path.write_text(
        "\n\n".join("\n".join(sentence() for _ in range(rng.randint(2, 12))) for _ in range(documents)),
        encoding="utf-8",
    )


def prepare(folder: Path) -> None:
    """Write what `config` reads: a text and a tokenizer."""
    write_text(folder / "text.txt")
    train_tokenizer(
        (folder / "text.txt").read_text(encoding="utf-8").split("\n\n"), vocab_size=100, min_frequency=1
    ).save_pretrained(folder / "tokenizer")


def config(folder: Path, output: str = "run", **changes) -> PretrainConfig:
    """A run over the text in `folder`: 10 steps, of which the last 4 on the longer rows."""
    choices = {
        "train": folder / "text.txt",
        "tokenizer": folder / "tokenizer",
        "output": folder / output,
        "shards": folder / "shards",
        "valid_fraction": 0.2,
        "model": MODEL,
        "steps": 10,
        "batch_size": 8,
        "micro_batch_size": 4,
        "stage_lengths": LENGTHS,
        "stage_fractions": (0.6, 0.4),
        "learning_rate": 3e-3,
        "warmup_fraction": 0.1,
        "bf16": False,
        "eval_every": 100,
        "eval_rows": 16,
        "checkpoint_every": 100,
        "log_every": 5,
        "workers": 0,
        "tensorboard": False,
    }
    return PretrainConfig(**choices | changes)


def tokenise(folder: Path) -> Shards:
    """Tokenise the text, as a run would."""
    return prepare_shards(
        (str(folder / "text.txt"),), load_tokenizer(folder / "tokenizer"), folder / "shards" / "train"
    )


def losses(output: Path) -> list[float]:
    """The raw losses of a run's steps."""
    return [line["loss"] for line in read_lines(output / "log.jsonl")]
