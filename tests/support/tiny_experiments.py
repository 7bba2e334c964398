"""Experiments that take seconds: a scale of two steps, generated text, and a folder in the layout of real data."""

from pathlib import Path

import tiny_pretraining
from rich.console import Console
from tiny_finetuning import write_glue

from mabert.experiments.catalogue import Suite
from mabert.experiments.cells import CellStore
from mabert.experiments.finetuning import Finetuning
from mabert.experiments.pretraining import Pretraining
from mabert.experiments.scales import CausalScale, ParaphraseScale, RecallScale, Scale
from mabert.experiments.sources import Sources

QUIET = Console(quiet=True)

SECONDS = Scale(
    name="seconds",
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=400,
    steps=4,
    batch_size=4,
    micro_batch_size=4,
    stage_lengths=(16, 32),
    stage_fractions=(0.5, 0.5),
    learning_rate=1e-2,
    bf16=False,
    eval_rows=8,
    text_lines=200,
    budgets=(0.5, 1.0),
    patterns=("TTTTTTTTTTTT", "MMTMMTMMTMMT"),
    pattern_budget=1.0,
    tasks=("RTE",),
    max_train_rows=16,
    max_length=16,
    finetuning_seeds=2,
    learning_rates=(1e-3, 1e-2),
    batch_sizes=(8,),
    epochs=(1,),
    causal=CausalScale(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=96,
        layers=4,
        length=128,
        steps=4,
        batch_size=2,
        micro_batch_size=2,
        learning_rate=1e-2,
        eval_rows=4,
        schedules=("V9",),
        timed="tiny",
        timed_lengths=(64, 128),
        timed_points=3,
    ),
    recall=RecallScale(
        hidden_size=16,
        intermediate_size=64,
        vocab_size=128,
        kinds=("mqar",),
        lengths=(48,),
        beyond=(64,),
        pairs=(3,),
        lessons=(0, 2),
        lesson_steps=(2, 2),
        lesson_tokens=48,
        copied=12,
        steps=4,
        tokens=96,
        seeds=1,
        eval_rows=4,
    ),
    paraphrase=ParaphraseScale(
        models=("sequential",),
        ratios=(0.25,),
        orders=("passage-first", "paraphrase-first"),
        steps=2,
        seeds=1,
        eval_rows=4,
        pairs=1,
        taught=4,
        taught_tokens=96,
    ),
)


def suite(folder: Path, scale: Scale = SECONDS, data: Path | None = None) -> Suite:
    """The experiments at a scale, with results and work in a folder."""
    store = CellStore(folder / "results", folder / "work")
    sources = Sources(scale, store.work, data)
    return Suite(scale, Pretraining(sources, store.work, QUIET), Finetuning(sources, store, QUIET))


def write_data(folder: Path) -> Path:
    """Text and two tasks in the layout that `--data` takes."""
    (folder / "text").mkdir(parents=True)
    tiny_pretraining.write_text(folder / "text" / "some.train.txt")
    tiny_pretraining.write_text(folder / "text" / "some.valid.txt", documents=30, seed=1)
    write_glue(folder / "glue")
    return folder
