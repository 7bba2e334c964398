"""Drift: how far padding moves the vectors of a sentence (the paper's Figures 3 and 4 of Section 4.4).

Each sentence runs without pads and with more and more of them, by the same weights, under every psm mode.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from mabert.experiments.architectures import MABERTS
from mabert.experiments.cells import Cell
from mabert.experiments.scales import Scale
from mabert.inference.batches import tokenize
from mabert.inference.loading import (
    default_device,
    load_config,
    load_matching_tokenizer,
    load_model,
    longest_sequence,
)
from mabert.layers.padding import PSM

PADS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
SIDES = ("right", "left", "both")
MODES = {psm: {"psm": psm, "execution": "padded"} for psm in PSM} | {"packed": {"psm": "exact", "execution": "packed"}}
MEASURES = ("cls", "mean", "unmasked_mean")
"""The vector of [CLS]; the mean over the sentence's tokens; the mean over all positions, pads too.

The paper calls its second panel "unmasked mean" and says in words that pads are left out: both are measured.
"""
BATCH_TOKENS = 8192


def measure_drift(
    folder: str | Path,
    texts: Sequence[str],
    *,
    side: str = "right",
    pads: Sequence[int] = PADS,
    modes: Sequence[str] = tuple(MODES),
    pad_content: str = "[PAD]",
) -> dict[str, Any]:
    """Cosine distances between each text's vectors with pads and without any.

    Texts longer than the model takes are cut. Pads take no position, so there may be more than the model has.

    Args:
        folder: a MaBERT with its tokenizer.
        side: where the pads stand, "right", "left", or "both": half of them on the left.
        pads: how many, in growing numbers.
        modes: keys of `MODES`.
        pad_content: the token that the pads hold.

    Returns:
        "rows" and how many of them were cut ("truncated"), "side", "pads", and "modes": mode -> measure -> "mean",
        "std" (of the population) and "max" over the texts, each a list with one number for each entry of `pads`.

    Raises:
        ModelFolderError: it is not a folder of a MaBERT.
        ValueError: there are no texts, the pads are negative or do not grow, there is no such side, mode or token, or
            an output is NaN or infinite.
    """
    if not texts:
        raise ValueError("there are no texts: drift is measured on at least one sentence")
    if not pads or min(pads) < 0 or sorted(set(pads)) != list(pads):
        raise ValueError(f"pads={tuple(pads)} must be growing numbers of pads, none below 0, as {PADS}")
    if side not in SIDES:
        raise ValueError(f"side={side!r} is not one of {', '.join(map(repr, SIDES))}")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"there is no psm mode {unknown[0]!r}. There are {', '.join(MODES)}")
    config = load_config(folder)
    if config.model_type != "mabert":
        raise ValueError(f"{folder} is a {config.model_type} model: only a MaBERT has psm modes to compare")
    tokenizer = load_matching_tokenizer(folder, config)
    pad_id = tokenizer.get_vocab().get(pad_content)
    if pad_id is None:
        raise ValueError(f"pad_content={pad_content!r} is no token of {folder}: name one of its vocabulary")
    features, cut = tokenize(tokenizer, texts, max_length=longest_sequence(config, tokenizer), truncate=True)
    rows = [feature["input_ids"] for feature in features]

    found: dict[str, Any] = {}
    for mode in modes:
        model = load_model(AutoModel, folder, load_config(folder, **MODES[mode]))
        model.to(default_device())  # type: ignore[arg-type]
        reference = _vectors(model, rows, 0, 0, pad_id)
        by_pads = []
        for n in pads:
            left = {"right": 0, "left": n, "both": n // 2}[side]
            by_pads.append(cosine_distance(_vectors(model, rows, left, n - left, pad_id), reference))
        distance_PSM = torch.stack(by_pads)
        found[mode] = {
            measure: {
                "mean": distance_PS.mean(1).tolist(),
                "std": distance_PS.std(1, correction=0).tolist(),
                "max": distance_PS.amax(1).tolist(),
            }
            for measure, distance_PS in zip(MEASURES, distance_PSM.unbind(2), strict=True)
        }
    return {"rows": len(rows), "truncated": cut, "side": side, "pads": list(pads), "modes": found}


def drift_cells(
    scale: Scale, pretrained: Mapping[str, Cell], sentences: Callable[[], tuple[str, list[str]]]
) -> list[Cell]:
    """The cells of the drift experiment: each pretrained MaBERT with right and with left pads.

    Args:
        pretrained: a name of `MABERTS` -> the cell that leaves its checkpoint; the artifact lies in its folder.
        sentences: gives what the texts are, and the texts. They are read at once: what is missing shows before training.
    """
    data, texts = sentences()
    texts = texts[: scale.drift_rows]
    return [_cell(name, cell, side, data, texts) for name, cell in pretrained.items() for side in ("right", "left")]


def _cell(name: str, pretrained: Cell, side: str, data: str, texts: list[str]) -> Cell:
    direction, conv = MABERTS[name]["scan_direction"], MABERTS[name]["conv_mode"]
    assert pretrained.artifact is not None
    folder = pretrained.artifact.parent

    def run() -> dict[str, Any]:
        result = {"data": data} | measure_drift(folder, texts, side=side)
        return result | {"findings": []}

    return Cell(
        name=f"drift/{name}/{direction}-{conv}/{side}",
        config={
            "pretraining": pretrained.config,
            "side": side,
            "data": data,
            "rows": len(texts),
            "pads": list(PADS),
            "modes": MODES,
        },
        run=run,
        needs=(pretrained,),
    )


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the vectors (..., H) in float64, as half the squared distance of the unit vectors.

    So it is 0 for equal vectors, never negative, and keeps its digits where 1 - cos would cancel them.
    """
    return (F.normalize(a.double(), dim=-1, eps=0) - F.normalize(b.double(), dim=-1, eps=0)).square().sum(-1) / 2


@torch.inference_mode()
def _vectors(model: PreTrainedModel, rows: Sequence[list[int]], left: int, right: int, pad_id: int) -> Tensor:
    """(texts, MEASURES, H) of token ids with pads around them, float64."""
    vectors = torch.empty(len(rows), len(MEASURES), model.config.hidden_size, dtype=torch.float64)
    for batch in _equal_lengths(rows, left + right):
        ids_BL = torch.tensor([rows[row] for row in batch], device=model.device)
        padded_BL = F.pad(ids_BL, (left, right), value=pad_id)
        mask_BL = F.pad(torch.ones_like(ids_BL), (left, right))
        x_BLH = model(padded_BL, attention_mask=mask_BL).last_hidden_state.cpu().double()
        tokens_BLH = x_BLH[:, left : left + ids_BL.shape[1]]
        vectors[batch] = torch.stack((tokens_BLH[:, 0], tokens_BLH.mean(1), x_BLH.mean(1)), dim=1)
    if not torch.isfinite(vectors).all():
        raise ValueError("the model gives NaN or infinite outputs: its weights are damaged or diverged")
    return vectors


def _equal_lengths(rows: Sequence[list[int]], pads: int) -> Iterator[list[int]]:
    """Indices of texts of one length, so that a batch needs no pads of its own."""
    of_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(rows):
        of_length[len(ids)].append(index)
    for length, indices in of_length.items():
        size = max(1, BATCH_TOKENS // (length + pads))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))
