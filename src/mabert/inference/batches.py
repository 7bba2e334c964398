"""Texts to token ids to batches of similar length to one row of numbers a text, in the order of the texts."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerFast

from mabert.inference.loading import (
    default_device,
    load_config,
    load_matching_tokenizer,
    load_model,
    longest_sequence,
)

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30

Features = dict[str, list[int]]
"""Token ids of one text or pair, and what else the model takes beside them."""


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    truncate: bool,
    name: str = "text",
    first: int = 1,
) -> tuple[list[Features], int]:
    """Token ids of each text (or text and partner), and how many were cut; of a pair the longer one is cut first.

    Raises:
        ValueError: a text, called `name` and its number (from `first` on), has more than `max_length` tokens and
            `truncate` is False; or the partners are not as many as the texts.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"{len(texts)} texts have {len(pairs)} partners: give one for each")

    def run(rows: Sequence[int], **cut: Any) -> list[Features]:
        if not rows:
            return []
        partners = None if pairs is None else [pairs[row] for row in rows]
        encoded = tokenizer([texts[row] for row in rows], partners, return_attention_mask=False, verbose=False, **cut)
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    features = run(range(len(texts)))
    long = [row for row, feature in enumerate(features) if len(feature["input_ids"]) > max_length]
    if long and not truncate:
        others = f" (and {len(long) - 1} others are too long)" if len(long) > 1 else ""
        tokens = len(features[long[0]]["input_ids"])
        raise ValueError(
            f"{name} {long[0] + first} has {tokens} tokens, more than {max_length}{others}: shorten or split it, or "
            "have long texts cut (truncate=True)"
        )
    for row, feature in zip(long, run(long, truncation="longest_first", max_length=max_length), strict=True):
        features[row] = feature
    return features, len(long)


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts of similar length, the longest first, at most `batch_tokens` tokens (pads counted) together.

    A single text that is longer is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def map_batches(
    model: PreTrainedModel,
    collate: Callable[[list[Features]], Mapping[str, Tensor]],
    features: Sequence[Features],
    forward: Callable[[dict[str, Tensor]], Tensor],
    *,
    batch_tokens: int,
    padded_to: int = 0,
    bf16: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Run `forward(inputs) -> (batch, D)` of the model over all texts: float32 (n, D) in the order of `features`.

    `collate` makes a batch of features, padded to `padded_to` tokens or, where that is 0, to the longest one.
    `advance` is told the number of texts of each finished batch.

    Raises:
        ValueError: there are no texts, or an output is NaN or infinite.
    """
    if not features:
        raise ValueError("there are no texts")
    rows: np.ndarray | None = None
    was_training = model.training
    model.eval()
    try:
        lengths = [max(padded_to, len(feature["input_ids"])) for feature in features]
        for batch in length_batches(lengths, batch_tokens):
            inputs = {key: value.to(model.device) for key, value in collate([features[row] for row in batch]).items()}
            with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                outputs = forward(inputs).float()
            if not torch.isfinite(outputs).all():
                raise ValueError("the model gives NaN or infinite outputs: its weights are damaged or diverged")
            if rows is None:
                rows = np.empty((len(features), outputs.shape[1]), dtype=np.float32)
            rows[batch] = outputs.cpu().numpy()
            advance(len(batch))
    finally:
        model.train(was_training)
    assert rows is not None
    return rows


class RunOptions(TypedDict, total=False):
    """How texts are run through a model."""

    max_length: int | None
    """Tokens of the longest text or pair, special ones included; default: what the model takes."""
    truncate: bool
    """Cut longer ones, and say how many, instead of refusing them."""
    batch_tokens: int
    """Tokens in one forward pass, pads included; default 8,192."""
    bf16: bool
    """Autocast to bfloat16."""
    progress: bool
    """Show progress and the time left on the error stream."""


class Runner:
    """A model folder, loaded into `auto_class` on the accelerator where there is one, ready to run over texts."""

    def __init__(
        self,
        auto_class: Any,
        folder: str | Path,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        batch_tokens: int = 8192,
        bf16: bool = False,
        progress: bool = False,
    ):
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
        config = load_config(folder)
        self.tokenizer = load_matching_tokenizer(folder, config)
        self.max_length = longest_sequence(config, self.tokenizer, max_length)
        self.model = load_model(auto_class, folder, config)
        self.model.to(default_device())  # type: ignore[arg-type]
        self.truncate, self.batch_tokens, self.bf16 = truncate, batch_tokens, bf16
        self.console = Console(stderr=True) if progress else None

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, name: str = "text", first: int = 1
    ) -> tuple[list[Features], int]:
        """`tokenize`, by the options."""
        return tokenize(
            self.tokenizer, texts, pairs, max_length=self.max_length, truncate=self.truncate, name=name, first=first
        )

    def say_cut(self, cut: int, total: int) -> None:
        """Report texts that were truncated."""
        if cut:
            logger.warning("%d of %d texts were cut to %d tokens", cut, total, self.max_length)

    def run(
        self,
        features: Sequence[Features],
        forward: Callable[[dict[str, Tensor]], Tensor],
        advance: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:
        """`map_batches`, by the options."""
        return map_batches(
            self.model,
            DataCollatorWithPadding(self.tokenizer),
            features,
            forward,
            batch_tokens=self.batch_tokens,
            bf16=self.bf16,
            advance=advance,
        )


@contextlib.contextmanager
def progress_bar(what: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Give a function that reports a number of finished texts: as a bar with the time left on a terminal, elsewhere as
    a line every half minute; without a console not at all."""
    if console is None:
        yield lambda count: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        began = reported = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, reported
            done += count
            progress.update(task, completed=done)
            now = time.monotonic()
            if progress.disable and now - reported >= SECONDS_BETWEEN_LINES:
                reported = now
                left = timedelta(seconds=round((now - began) / done * (total - done)))
                console.print(
                    f"{what}: {done:,} of {total:,}, {left} left", soft_wrap=True, highlight=False, markup=False
                )

        yield advance
