"""`mabert predict`, `fill-mask`, `generate`, `encode`: a trained model in use."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mabert_cli.console import output
from mabert_cli.overrides import parse

Model = Annotated[Path, typer.Argument(help="Model folder that pretraining or fine-tuning wrote.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of the longest text; default: what the model takes.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut longer texts instead of refusing them.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens in one forward pass, pads included.")]
BFloat16 = Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")]


def predict(
    model: Model,
    source: Annotated[Path, typer.Argument(help="Table with a text column: .tsv .csv .jsonl .parquet")],
    target: Annotated[Path, typer.Option("--output", "-o", help="Where to write predictions: .tsv or .jsonl")],
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    text_pair_column: Annotated[str | None, typer.Option(help="Column with the second text of a pair.")] = None,
    max_length: MaxLength = None,
    truncate: Truncate = False,
    batch_tokens: BatchTokens = 8192,
    bf16: BFloat16 = False,
) -> None:
    """Label every row of a table with a fine-tuned model.

    Example: [bold]mabert predict runs/rte new.tsv --output labels.tsv --text-column sentence[/]
    """
    from mabert.inference.predict import predict_file

    predictions = predict_file(
        source,
        target,
        model_folder=model,
        text_column=text_column,
        text_pair_column=text_pair_column,
        max_length=max_length,
        truncate=truncate,
        batch_tokens=batch_tokens,
        bf16=bf16,
        progress=True,
    )
    output.print(f"{len(predictions):,} predictions in {escape(str(target))}")


def fill_mask(
    model: Model,
    text: Annotated[str, typer.Argument(help="Text with one or more [MASK].", metavar="TEXT")],
    top_k: Annotated[int, typer.Option(help="How many tokens to show for each mask.")] = 5,
) -> None:
    """Show what a pretrained model puts in place of [MASK].

    Example: [bold]mabert fill-mask runs/tiny "The function returns a \\[MASK]."[/]
    """
    from mabert.inference.fill_mask import fill_mask as fill

    for number, fills in enumerate(fill(text, model, top_k=top_k)):
        if number:
            output.print()
        for candidate in fills:
            output.print(
                f"{candidate.probability:6.1%}  [cyan]{escape(candidate.token):16}[/]  {escape(candidate.text)}"
            )


def generate(
    model: Model,
    texts: Annotated[list[str], typer.Argument(help="Beginnings of texts, each in quotes.", metavar="TEXT…")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add to each text, at most.")] = 50,
    temperature: Annotated[
        float, typer.Option(help="0: the most probable token each time; above it tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the tokens that have this much probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    transpoints: Annotated[
        str | None, typer.Option(help="TransMamba: another schedule, V1 to V9, or tokens as 0,128,256.")
    ] = None,
) -> None:
    """Go on with a text by a causal model.

    Example: [bold]mabert generate runs/transmamba "The history of" --temperature 0.8[/]
    """
    from mabert.inference.generate import generate as go_on

    answers = go_on(
        texts,
        model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        transpoints=None if transpoints is None else parse(transpoints, str | tuple[int, ...], "transpoints"),
    )
    for answer in answers:
        output.print(answer, markup=False, highlight=False, soft_wrap=True)


def encode(
    model: Model,
    source: Annotated[Path, typer.Argument(help="One text a line (.txt .txt.gz .txt.xz), or a table.")],
    target: Annotated[Path, typer.Argument(help="Where to write the vectors: .npy, float32, one row a text.")],
    text_column: Annotated[str | None, typer.Option(help="Column with the text, for a table.")] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="map, cls or mean; default: map where a head was trained with it, else mean."),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    max_length: MaxLength = None,
    truncate: Truncate = False,
    batch_tokens: BatchTokens = 8192,
    bf16: BFloat16 = False,
) -> None:
    """Turn texts into vectors.

    Example: [bold]mabert encode runs/tiny sentences.txt vectors.npy --normalize[/]
    """
    from mabert.inference.encode import encode_file

    rows, width = encode_file(
        source,
        target,
        model,
        text_column=text_column,
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        truncate=truncate,
        batch_tokens=batch_tokens,
        bf16=bf16,
        progress=True,
    )
    output.print(f"{rows:,} vectors of {width} numbers in {escape(str(target))}")
