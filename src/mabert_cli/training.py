"""`mabert tokenizer`, `mabert pretrain`, `mabert finetune`: from text to a trained model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from mabert_cli.console import errors, output, table

if TYPE_CHECKING:
    from mabert.data.corpus import Corpus

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]


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
    """Each source with its size on disk."""
    for source in corpus.sources:
        yield str(source), f"{source.stat().st_size / 2**20:.2f} MiB" if isinstance(source, Path) else "not known"


def watched(corpus: "Corpus") -> Iterator[str]:
    """The documents of a corpus, with a progress bar while they are read."""
    columns = (SpinnerColumn(), TextColumn("{task.fields[documents]:,} documents"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("reading", total=1 if corpus.fraction is not None else None, documents=0)
        for number, document in enumerate(corpus, start=1):
            bar.update(task, completed=corpus.fraction or 0, documents=number)
            yield document


def pretrain() -> None:
    """Pretrain."""


def finetune() -> None:
    """Finetune."""
