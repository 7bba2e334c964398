"""What is planted in the data is found, and nothing else: true labels are learnt, shuffled ones score at chance."""

import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binom

from mabert import MaBertConfig, MaBertForMaskedLM
from mabert.data import generated
from mabert.data.tokenizer import train_tokenizer
from mabert.experiments.comparison import paired_comparison
from mabert.training.finetune import FinetuneConfig, FinetuneResult, finetune

TRAIN, DEV = 2000, 500


def write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    path.write_text("\n".join(["sentence\tlabel", *map("\t".join, rows)]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinetuneResult]:
    """Two runs on the short sentences of the task: on their labels, and on all of them shuffled.

    Both start from the same random weights; `dev` has the labels of the run's kind, `test` the true ones.
    """
    folder = tmp_path_factory.mktemp("planted")
    rows = [(sentence, label) for sentence, label in generated.examples(6500) if len(sentence.split()) <= 6]
    rows = rows[: TRAIN + DEV]
    sentences, labels = zip(*rows, strict=True)
    shuffled = list(zip(sentences, random.Random(0).sample(labels, len(labels)), strict=True))
    for kind, labelled in (("true", rows), ("shuffled", shuffled)):
        write(folder / f"train-{kind}.tsv", labelled[:TRAIN])
        write(folder / f"dev-{kind}.tsv", labelled[TRAIN:])

    tokenizer = train_tokenizer(sentences, vocab_size=500)
    torch.manual_seed(0)
    model = MaBertConfig(
        pattern="M",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        state_size=4,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        initializer_range=0.1,  # so narrow a model learns little from weights as small as a wide one's
    )
    MaBertForMaskedLM(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {
        kind: finetune(
            FinetuneConfig(
                model=folder / "model",
                output=folder / kind,
                train=folder / f"train-{kind}.tsv",
                dev=folder / f"dev-{kind}.tsv",
                test=folder / "dev-true.tsv",
                text_column="sentence",
                max_length=32,
                epochs=6,
                batch_size=16,
                learning_rate=5e-3,
            ),
            console=Console(file=io.StringIO()),
        )
        for kind in ("true", "shuffled")
    }


def test_true_labels_are_learnt(results: dict[str, FinetuneResult]) -> None:
    assert len(rows_of(results["true"])) == DEV
    assert results["true"].splits["dev"].metrics["accuracy"] > 0.75


@pytest.mark.parametrize("split", ["dev", "test"])
def test_shuffled_labels_score_at_chance(results: dict[str, FinetuneResult], split: str) -> None:
    score = results["shuffled"].splits[split]
    low, high = binom.interval(0.9999, DEV, 0.5)
    assert low <= score.metrics["accuracy"] * score.rows <= high
    assert abs(score.metrics["mcc"]) < 0.2


def test_the_comparison_finds_which_labels_were_true(results: dict[str, FinetuneResult]) -> None:
    gold, learnt = predictions(results["true"])
    same_gold, guessed = predictions(results["shuffled"])
    assert (gold == same_gold).all()
    found = paired_comparison(gold, learnt[None], guessed[None], "mcc")
    assert 0.2 < found["low"] < found["difference"] < found["high"]


def rows_of(result: FinetuneResult) -> list[dict[str, str]]:
    with (result.output / "predictions-test.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def predictions(result: FinetuneResult) -> tuple[np.ndarray, np.ndarray]:
    rows = rows_of(result)
    gold, predicted = ([generated.LABELS.index(row[column]) for row in rows] for column in ("gold", "predicted"))
    return np.array(gold), np.array(predicted)
