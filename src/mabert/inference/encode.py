"""Sentence vectors: texts in any order, batched by length, given back in the order they came in."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from mabert.data.formats import read_lines
from mabert.data.tables import read_table
from mabert.files import atomic_write
from mabert.inference.batches import Runner, RunOptions, progress_bar
from mabert.inference.loading import ModelFolderError, load_config
from mabert.models.encoder import MaBertForSequenceClassification

POOLINGS = ("map", "cls", "mean")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.xz")
WINDOW = 16_384
"""Texts that are sorted by length, and held in memory, together."""


class EncodeOptions(RunOptions, total=False):
    """How texts are encoded."""

    pooling: str | None
    """"map" (of a trained classification head), "cls", or "mean" over real tokens. Default: "map" where the folder has
    a head trained with it, else "mean"."""
    normalize: bool
    """Scale every vector to length 1."""


def encode(texts: Sequence[str], model_folder: str | Path, **options: Unpack[EncodeOptions]) -> np.ndarray:
    """One vector a text, float32 (n, H), in the order of `texts`. For the options see `EncodeOptions`.

    An empty text is `[CLS][SEP]`. A vector does not depend on what its text is batched with.

    Raises:
        ModelFolderError: the folder cannot be used, or has no head for `pooling="map"`.
        ValueError: a text is longer than `max_length` tokens and not to be cut, or an option is out of range.
    """
    encoder = _Encoder(model_folder, **options)
    return np.concatenate([np.empty((0, encoder.width), np.float32), *encoder.blocks(lambda: iter(texts), "text")])


def encode_file(
    source: str | Path,
    output: str | Path,
    model_folder: str | Path,
    *,
    text_column: str | None = None,
    **options: Unpack[EncodeOptions],
) -> tuple[int, int]:
    """Write one vector a text to `output` (.npy, float32) and return the array's shape.

    `source` is a text file with one text a line (`.txt .txt.gz .txt.xz`; an empty line is an empty text), which is
    never held in memory whole, or a table with a `text_column`. `output` appears when all is done, or not at all.

    Raises:
        ModelFolderError, ValueError: as `encode`, and for a source that cannot be read or holds no text.
    """
    source, output = Path(source), Path(output)
    if output.suffix != ".npy":
        raise ValueError(f"{output} must end in .npy")
    encoder = _Encoder(model_folder, **options)
    texts, name = _open_source(source, text_column)
    count = sum(1 for _ in texts())
    if not count:
        raise ValueError(f"{source} holds no text")
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, encoder.width)}
    with atomic_write(output) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in encoder.blocks(texts, name):
            file.write(block.astype("<f4").tobytes())
    return count, encoder.width


class _Encoder:
    """A model folder, ready to encode."""

    def __init__(
        self,
        folder: str | Path,
        *,
        pooling: str | None = None,
        normalize: bool = False,
        **options: Unpack[RunOptions],
    ):
        self.pooling = _resolve_pooling(pooling, folder)
        self.normalize = normalize
        auto_class = AutoModelForSequenceClassification if self.pooling == "map" else AutoModel
        self.runner = Runner(auto_class, folder, **options)
        self.width: int = self.runner.model.config.hidden_size

    def blocks(self, texts: Callable[[], Iterator[str]], name: str) -> Iterator[np.ndarray]:
        """Vectors of the texts in their order, one window of texts after another.

        `texts` starts the texts anew at each call: all lengths are checked before hours of work are begun.
        """
        total = cut = 0
        for start, window in _windows(texts()):
            cut += self.runner.tokenize(window, name=name, first=start + 1)[1]
            total += len(window)
        self.runner.say_cut(cut, total)
        with progress_bar("encoding", total, self.runner.console) as advance:
            for _, window in _windows(texts()):
                features, _ = self.runner.tokenize(window)
                yield self.runner.run(features, self._vectors, advance)

    def _vectors(self, inputs: dict[str, Any]) -> Tensor:
        """(B, L) inputs to (B, H)."""
        model = self.runner.model
        if self.pooling == "map":
            assert isinstance(model, MaBertForSequenceClassification)
            x, layout, _ = model.mabert.encode(**inputs)
            vectors = model.pooling(x, layout)
        else:
            x_BLH = model(**inputs).last_hidden_state
            mask_BL = inputs["attention_mask"].bool()
            if self.pooling == "cls":
                vectors = x_BLH[torch.arange(len(x_BLH)), mask_BL.int().argmax(1)]
            else:
                vectors = x_BLH.where(mask_BL[..., None], 0).sum(1) / mask_BL.sum(1, keepdim=True)
        return torch.nn.functional.normalize(vectors.float(), dim=-1) if self.normalize else vectors


def _resolve_pooling(pooling: str | None, folder: str | Path) -> str:
    """The pooling asked for, or the one that suits the folder."""
    config = load_config(folder)
    has_map = "MaBertForSequenceClassification" in (config.architectures or ()) and config.pooling == "map"
    if pooling is None:
        return "map" if has_map else "mean"
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not one of {', '.join(map(repr, POOLINGS))}")
    if pooling == "map" and not has_map:
        raise ModelFolderError(
            f"{folder} has no classification head trained with pooling='map', only fine-tuning makes one: use 'mean' "
            "or 'cls', or a fine-tuned folder"
        )
    return pooling


def _open_source(source: Path, text_column: str | None) -> tuple[Callable[[], Iterator[str]], str]:
    """A function that starts the texts of a file anew, and what to call one of them."""
    if text_column is not None:
        table = read_table(source, text_columns=[text_column])
        return lambda: iter(table.texts), f"{source}, row"
    if not source.name.endswith(TEXT_SUFFIXES):
        raise ValueError(f"{source}: name the column with the text (text_column), or give a {' '.join(TEXT_SUFFIXES)}")

    def lines() -> Iterator[str]:
        with source.open("rb") as file:
            yield from (line for _, line in read_lines(file, ValueError))

    return lines, f"{source}, line"


def _windows(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    start = 0
    while window := list(islice(texts, WINDOW)):
        yield start, window
        start += len(window)
