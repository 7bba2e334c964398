"""From text to a fine-tuned classifier on this machine, in minutes: what `make demo` runs.

The text is the documentation of the installed Python. The steps are those of a real run, only smaller: tokenizer,
masked language modelling, fine-tuning, use. Stopped with Ctrl-C, it goes on from there when it is run again.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

import stdlib_text
from mabert import MaBertConfig
from mabert.data import generated
from mabert.data.corpus import iter_documents
from mabert.data.tokenizer import train_tokenizer
from mabert.files import atomic_folder
from mabert.inference.fill_mask import fill_mask
from mabert.training.callbacks import TrainingInterruptedError
from mabert.training.finetune import FinetuneConfig, FinetuneResult, finetune
from mabert.training.pretrain import PretrainConfig, PretrainResult, pretrain

MASKED = (
    "Return [MASK] string.",
    "Return the [MASK] of the list.",
    "Return true if the [MASK] is a string.",
    "Raises an [MASK] if the name is not found.",
)

say = Console(highlight=False, soft_wrap=True)


def write_data(folder: Path) -> None:
    """The text, a tokenizer trained on it, and the sentences to judge; what is there already is kept."""
    if not (folder / "text").exists():
        with atomic_folder(folder / "text") as text:
            stdlib_text.write_text(text)
    if not (folder / "acceptability").exists():
        with atomic_folder(folder / "acceptability") as tables:
            generated.write_tables(tables)
    if not (folder / "tokenizer").exists():
        with atomic_folder(folder / "tokenizer") as tokenizer:
            train_tokenizer(iter_documents(folder / "text" / "train.txt"), vocab_size=4096).save_pretrained(tokenizer)


def pretrain_config(folder: Path, quick: bool) -> PretrainConfig:
    """The paper's pattern in small: rows of 64 tokens, no second stage, no dropout, many small steps."""
    return PretrainConfig(
        train=(str(folder / "text" / "train.txt"),),
        valid=(str(folder / "text" / "heldout.txt"),),
        tokenizer=folder / "tokenizer",
        output=folder / "pretrained",
        model=MaBertConfig.tiny(
            hidden_size=64,
            intermediate_size=256,
            expand=1,
            state_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        steps=4 if quick else 1000,
        batch_size=8,
        micro_batch_size=8,
        stage_lengths=(64,),
        stage_fractions=(1.0,),
        learning_rate=3e-3,
        warmup_fraction=0.1,
        bf16=False,
        eval_every=500,
        eval_rows=8 if quick else 512,
        checkpoint_every=200,
        tensorboard=False,
        workers=0,
    )


def finetune_config(folder: Path, quick: bool) -> FinetuneConfig:
    """Acceptable or not, read from a table; the dev sentences are looked at once, at the end."""
    return FinetuneConfig(
        model=folder / "pretrained",
        output=folder / "classifier",
        train=folder / "acceptability" / "train.tsv",
        dev=folder / "acceptability" / "dev.tsv",
        text_column="sentence",
        max_train_rows=64 if quick else None,
        max_length=32,
        epochs=1 if quick else 2,
        learning_rate=1e-3,
    )


def show_masks(model: Path) -> None:
    """What the pretrained model fills in."""
    for text in MASKED:
        fills = ", ".join(f"{fill.token} {fill.probability:.0%}" for fill in fill_mask(text, model, top_k=4)[0])
        say.print(f"  {text}  [cyan]{fills}[/]".replace("[MASK]", "\\[MASK]"))


def failures(pretrained: PretrainResult, classifier: FinetuneResult) -> list[str]:
    """What a model that has learnt something would not show."""
    found = []
    if not pretrained.held_out_loss < pretrained.unigram_entropy:
        found.append(f"held-out loss {pretrained.held_out_loss:.3f} is not below the unigram entropy")
    dev = classifier.splits["dev"]
    if not dev.metrics["accuracy"] > dev.majority["accuracy"]:
        found.append(f"accuracy {dev.metrics['accuracy']:.3f} is not above the majority class")
    return found


def show_commands(folder: Path) -> None:
    """Commands that use what the demo has left, for the shell that it was started in."""
    mabert = Path(sys.executable).with_name("mabert")
    if mabert.is_relative_to(Path.cwd()):
        mabert = mabert.relative_to(Path.cwd())
    say.print("\n[bold]Next[/]")
    for command in (
        f'fill-mask {folder}/pretrained "This [MASK] returns a string."',
        f"predict {folder}/classifier {folder}/acceptability/dev.tsv -o {folder}/labels.tsv --text-column sentence",
        f"encode {folder}/pretrained {folder}/text/heldout.txt {folder}/vectors.npy --truncate",
    ):
        say.print(f"  {mabert} {command}", markup=False)


def run(folder: Path, quick: bool) -> int:
    """All steps; 1 where the models learnt nothing."""
    say.print("[bold]1. Text, sentences and tokenizer[/] from the documentation of this Python")
    write_data(folder)
    say.print("[bold]2. Pretraining[/] by masked language modelling, pattern MMTMMTMMTMMT")
    pretrained = pretrain(pretrain_config(folder, quick), console=say)
    say.print(
        f"held-out loss {pretrained.held_out_loss:.3f}, unigram entropy {pretrained.unigram_entropy:.3f}, "
        f"{pretrained.tokens:,} tokens at {pretrained.tokens_per_second:,.0f} tokens/s"
    )
    show_masks(folder / "pretrained")
    say.print("[bold]3. Fine-tuning[/]: is a sentence acceptable?")
    classifier = finetune(finetune_config(folder, quick), console=say)
    dev = classifier.splits["dev"]
    say.print(
        f"accuracy on {dev.rows} new sentences {dev.metrics['accuracy']:.3f}, majority class "
        f"{dev.majority['accuracy']:.3f}"
    )
    show_commands(folder)
    for failure in (found := failures(pretrained, classifier)):
        say.print(f"[red]Failed: {failure}[/]")
    return 1 if found else 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--quick", action="store_true", help="a few steps only: enough to see that all of it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so small a model that threads would wait for each other; and everyone gets the same run
    try:
        return run(options.folder, options.quick)
    except (TrainingInterruptedError, KeyboardInterrupt) as stop:
        say.print(f"\n{stop or 'Stopped.'} Run it again to go on.", markup=False)
        return 130
    except ValueError as error:  # such as a folder that an earlier version of this demo has left
        say.print(f"{error} Delete {options.folder} to start over.", style="red", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
