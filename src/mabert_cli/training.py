"""`mabert tokenizer`, `mabert pretrain`, `mabert finetune`: from text to a trained model."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mabert_cli.console import errors, output, table
from mabert_cli.overrides import OverrideError, build_config, overridable, unknown

if TYPE_CHECKING:
    from mabert.data.corpus import Corpus
    from mabert.training.finetune import FinetunePlan, FinetuneResult
    from mabert.training.pretrain import Estimate, PretrainPlan, PretrainResult

Recipe = Callable[..., Any]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]
Assignments = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe.", metavar="KEY=VALUE…", show_default=False)
]


def tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(help="Text: files (.txt .jsonl, also .gz and .xz; .parquet), folders, globs, hf://name."),
    ],
    output_folder: Annotated[Path, typer.Option("--output", "-o", help="New folder to save the tokenizer in.")],
    vocab_size: Annotated[int, typer.Option(help="Largest number of tokens.")] = 30522,
    cased: Annotated[bool, typer.Option("--cased", help="Tell upper case from lower case.")] = False,
    min_frequency: Annotated[int, typer.Option(help="How often a pair must occur to become a token.")] = 2,
    max_length: Annotated[int, typer.Option(help="Longest sequence, in tokens, of the models it will serve.")] = 512,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl, .parquet and hf:// with the text.")] = "text",
    dry_run: DryRun = False,
) -> None:
    """Train a WordPiece tokenizer, as BERT's, on your text.

    Example: [bold]mabert tokenizer books/ articles.txt.xz --output tokenizer --vocab-size 16000[/]
    """
    from mabert.data.corpus import Corpus
    from mabert.data.tokenizer import train_tokenizer
    from mabert.files import atomic_folder

    corpus = Corpus(sources, text_column=text_column)
    if dry_run:
        output.print(table("Sources", sizes(corpus)))
        letters = "cased" if cased else "uncased"
        rows = [("vocabulary", f"up to {vocab_size:,} tokens, {letters}"), ("output", output_folder)]
        output.print(table("Tokenizer", rows))
        return
    with atomic_folder(output_folder) as folder:
        trained = train_tokenizer(
            watched(corpus),
            vocab_size=vocab_size,
            lowercase=not cased,
            min_frequency=min_frequency,
            model_max_length=max_length,
        )
        trained.save_pretrained(folder)
    output.print(f"{len(trained):,} tokens in {output_folder}")


def sizes(corpus: "Corpus") -> Iterator[tuple[str, str]]:
    """The size of each source on disk, and its name, which may be long."""
    for source in corpus.sources:
        yield size(source.stat().st_size) if isinstance(source, Path) else "size not known", str(source)


def watched(corpus: "Corpus") -> Iterator[str]:
    """The documents of a corpus, with progress while they are read: on a terminal a bar, elsewhere lines."""
    from mabert.inference.batches import SECONDS_BETWEEN_LINES

    columns = (SpinnerColumn(), TextColumn("{task.fields[documents]:,} documents"), BarColumn(), TimeRemainingColumn())
    reported = time.monotonic()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("reading", total=1 if corpus.fraction is not None else None, documents=0)
        for number, document in enumerate(corpus, start=1):
            bar.update(task, completed=corpus.fraction or 0, documents=number)
            if bar.disable and (now := time.monotonic()) - reported >= SECONDS_BETWEEN_LINES:
                reported = now
                errors.print(f"reading: {number:,} documents", soft_wrap=True, highlight=False)
            yield document


def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(help="tiny, mini, small, base (MaBERT's); causal: transmamba_tiny, transmamba, hybrid_tiny."),
    ],
    assignments: Assignments = None,
    dry_run: DryRun = False,
) -> None:
    """Pretrain a model on masked tokens, a causal one on next tokens. A stopped run goes on when it is started again.

    train=, tokenizer= and output= are needed; --dry-run lists every other key. model.KEY=VALUE changes the model;
    init_from=FOLDER model=none starts from a pretrained one. Several processes: torchrun --nproc-per-node 2 -m
    mabert_cli pretrain …

    Example: [bold]mabert pretrain tiny train=text.txt tokenizer=tokenizer output=runs/tiny steps=2000[/]
    """
    from mabert.experiments.recipes.pretrain import RECIPES
    from mabert.training import pretrain as training
    from mabert.training.pretrain_config import FROM_TOKENIZER

    fixed = {f"model.{name}": "comes from the tokenizer" for name in FROM_TOKENIZER}
    config = build_config(named(RECIPES, recipe), assignments or [], fixed)
    if dry_run:
        output.print(settings(config), "")
        plan = training.plan(config)
        output.print(table("Run", plan_rows(plan)), "")
        with output.status("measuring one step of each stage"):
            estimate = training.estimate(plan)
        stages = [f"stage {number}" for number in range(1, len(config.stage_lengths) + 1)]
        output.print(table("Estimate for this machine", estimate_rows(estimate, stages)))
        return
    with stoppable():
        result = training.pretrain(config, console=errors)
    if os.environ.get("RANK", "0") == "0":
        output.print(table(f"Model in {escape(str(result.output))}", result_rows(result)))


def finetune(
    recipe: Annotated[str, typer.Argument(help="glue (a task by its name) or table (your own).")],
    assignments: Assignments = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a pretrained model on classification or regression.

    glue needs task=, glue=, model= and output=; table needs train=, model= and output=. --dry-run lists every other
    key. A run that was stopped goes on when it is started again.

    Example: [bold]mabert finetune glue task=RTE glue=glue model=runs/tiny output=runs/rte epochs=5[/]
    """
    from mabert.experiments.recipes.finetune import RECIPES
    from mabert.training import finetune as training

    config = build_config(named(RECIPES, recipe), assignments or [])
    if dry_run:
        output.print(settings(config), "")
        plan = training.plan_finetune(config)
        output.print(table("Run", finetune_rows(plan)), "")
        with output.status("measuring one step"):
            estimate = training.estimate_finetune(plan)
        output.print(table("Estimate for this machine", estimate_rows(estimate, ("usual rows", "longest rows"))))
        return
    with stoppable():
        result = training.finetune(config, console=errors)
    output.print(table(f"Model in {escape(str(result.output))}", score_rows(result)))


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn a run that a signal stopped into its message and the signal's exit code."""
    from mabert.training.callbacks import TrainingInterruptedError

    try:
        yield
    except TrainingInterruptedError as stop:
        errors.print(str(stop), soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(128 + stop.signum) from stop


def named(recipes: Mapping[str, Recipe], name: str, what: str = "recipe") -> Recipe:
    """What goes by that name."""
    if name not in recipes:
        raise OverrideError(unknown(what, name, recipes))
    return recipes[name]


def settings(config: Any) -> Table:
    """Every field of a config with its value."""
    names = (name for name in overridable(config) if not is_dataclass(getattr(config, name, None)))
    return table("Settings", ((name, shown(attrgetter(name)(config))) for name in names))


def shown(value: Any) -> str:
    """A value as it would be written on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def plan_rows(plan: "PretrainPlan") -> Iterator[tuple[str, str]]:
    """A pretraining run in numbers."""
    config, layout = plan.config, plan.layout
    yield "parameters", f"{plan.parameters:,}"
    yield "vocabulary", f"{plan.model.vocab_size:,}"
    yield "steps", f"{plan.schedule.steps:,}, {plan.schedule.warmup_steps:,} of them warm-up"
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
    yield "batch", f"{config.batch_size:,} sequences: {processes} × {layout.accumulation} × {config.micro_batch_size}"
    for number, (length, steps, tokens) in enumerate(
        zip(config.stage_lengths, plan.schedule.stage_steps, plan.stage_tokens, strict=True), start=1
    ):
        epochs = f", {plan.epochs[number - 1]:.2f} epochs" if plan.epochs else ""
        yield f"stage {number}", f"{steps:,} steps of {length} tokens a sequence: {tokens:,} tokens{epochs}"
    yield "tokens", f"{plan.tokens:,}"
    yield "text", "tokenised already" if plan.rows else "not tokenised yet, so the epochs are not known"


def estimate_rows(estimate: "Estimate", kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Time and memory, as extrapolated from one step of each kind."""
    for kind, seconds in zip(kinds, estimate.step_seconds, strict=True):
        yield kind, f"{seconds:.2f} s a step"
    yield "time", f"{duration(estimate.seconds)} without evaluations and checkpoints"
    parts = ("weights", "gradients", "optimizer", "activations")
    listed = ", ".join(f"{part} {size(getattr(estimate, part))}" for part in parts)
    yield "memory", f"{size(estimate.memory)} in each process ({listed})"


def result_rows(result: "PretrainResult") -> Iterator[tuple[str, str]]:
    """What a pretraining run reached."""
    yield "held-out loss", f"{result.held_out_loss:.4f} nats (unigram entropy {result.unigram_entropy:.4f})"
    yield "perplexity", f"{result.perplexity:.2f}"
    yield "accuracy", f"{result.accuracy:.1%} of the predicted tokens"
    yield "steps", f"{result.steps:,} in {duration(result.seconds)}, {result.tokens_per_second:,.0f} tokens/s"
    yield "waiting for data", f"{result.data_wait:.1%} of the time"


def finetune_rows(plan: "FinetunePlan") -> Iterator[tuple[str, str]]:
    """A fine-tuning run in numbers."""
    data, config = plan.data, plan.config
    yield "parameters", f"{plan.parameters:,}"
    yield "labels", "numbers" if data.regression else ", ".join(data.label_names)
    for name, split in {"train": data.train, **data.evaluation}.items():
        cut = f", {split.truncated:,} cut to {config.max_length} tokens" if split.truncated else ""
        yield name, f"{len(split):,} rows{cut} {split.subset}".rstrip()
    if data.selection:
        yield "selection", f"{len(data.selection):,} rows of train"
    yield "metrics", ", ".join(data.metrics)
    yield "steps", f"{plan.schedule.steps:,}, {plan.schedule.warmup_steps:,} of them warm-up"
    yield "tokens", f"{plan.tokens:,}"


def score_rows(result: "FinetuneResult") -> Iterator[tuple[str, str]]:
    """The scores on each set, beside the majority class."""
    for name, split in result.splits.items():
        yield f"{name} {split.subset}".rstrip(), str(split)
    yield "steps", f"{result.steps:,} in {duration(result.seconds)}"


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
