"""Drift: how far padding moves the vectors of a sentence (the paper's Figures 3 and 4 of Section 4.4).

Each sentence runs without pads and with more and more of them, by the same weights, under every psm mode.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from mabert.experiments.architectures import MABERTS
from mabert.experiments.cells import Cell
from mabert.experiments.scales import Scale
from mabert.files import digest
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
MEASURES = {
    "cls": "[CLS]",
    "mean": "the mean of the tokens",
    "unmasked_mean": "the mean over all positions (pads too)",
}
"""The vectors that are compared.

The paper's second panel is called "unmasked mean", its text says that pads are left out: both are measured.
"""
OF_TOKENS = ("cls", "mean")
BATCH_TOKENS = 8192

# The padding-safety contract lets outputs of unit scale differ by 1e-5; this is the cosine distance it amounts to.
ROUNDING = 1e-5**2 / 2
# Drifts that differ by less than this share of the larger one are called the same.
SAME = 0.1
# PSM suppresses a drift strongly where it leaves less than this share of it.
SUPPRESSED = 0.1


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


def drift_cells(
    scale: Scale, pretrained: Mapping[str, Cell], sentences: Callable[[], tuple[str, list[str]]]
) -> list[Cell]:
    """The cells of the drift experiment: each pretrained MaBERT with right and with left pads.

    Args:
        pretrained: a name of `MABERTS` -> the cell that leaves its checkpoint; the artifact lies in its folder.
        sentences: gives what the texts are, and the texts; called at once, to find a missing file before training.
    """
    data, texts = sentences()
    texts = texts[: scale.drift_rows]
    return [_cell(name, cell, side, data, texts) for name, cell in pretrained.items() for side in ("right", "left")]


def _cell(name: str, pretrained: Cell, side: str, data: str, texts: list[str]) -> Cell:
    direction, conv = MABERTS[name]["scan_direction"], MABERTS[name]["conv_mode"]
    assert pretrained.artifact is not None
    folder = pretrained.artifact.parent

    def run() -> dict[str, Any]:
        weights = {"weights": digest(folder / SAFE_WEIGHTS_NAME)}
        result = {"data": data} | weights | measure_drift(folder, texts, side=side)
        return result | {"findings": findings(result, direction, conv, side)}

    return Cell(
        name=f"drift/{name}/{direction}-{conv}/{side}",
        config={
            "pretraining": pretrained.config,
            "side": side,
            "data": data,
            "rows": len(texts),
            "texts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
            "pads": list(PADS),
            "modes": MODES,
        },
        run=run,
        needs=(pretrained,),
    )


def findings(result: dict[str, Any], direction: str, conv: str, side: str) -> list[str]:
    """Where the paper's findings are met and where not, with the reason, from the numbers of `measure_drift`."""
    most, modes = result["pads"][-1], result["modes"]
    none, pre, post, both = (
        {measure: modes[mode][measure]["mean"][-1] for measure in MEASURES}
        for mode in ("none", "pre", "post", "pre+post")
    )
    without_psm = _largest(modes["none"], OF_TOKENS)
    said = [_exactness(modes, most)]
    if without_psm <= ROUNDING:
        why = (
            "a forward scan and a causal convolution read nothing behind a token, so that pads on the right reach none"
            if (direction, conv, side) == ("forward", "causal", "right")
            else "pads could reach tokens here, but what they leave is below rounding"
        )
        said.append(
            f"Without PSM no token moves (largest drift {_number(without_psm)}): {why}. PSM has nothing to do, and the "
            "paper's findings cannot show on tokens."
        )
    else:
        for measure in OF_TOKENS:
            said.append(_growth(result["pads"], modes["none"], measure, direction, side))
        left = [f"{MEASURES[measure]} {_number(both[measure])} of {_number(none[measure])}" for measure in OF_TOKENS]
        strongly = all(both[measure] < SUPPRESSED * none[measure] for measure in OF_TOKENS)
        said.append(
            f"Of the drift without PSM at {most} pads, the paper's PSM (pre+post) leaves {' and '.join(left)}: "
            + ("strongly suppressed, as in the paper." if strongly else "not strongly suppressed, unlike in the paper.")
        )
        for measure in OF_TOKENS:
            said.append(_pre_against_post(MEASURES[measure], pre[measure], post[measure], most))
        said.append(_both_against_pre(modes))
    return [
        *said,
        _growth(result["pads"], modes["none"], "unmasked_mean", direction, side),
        _all_positions(pre, post, both, most),
    ]


def _exactness(modes: dict[str, Any], most: int) -> str:
    drifts = {mode: _largest(modes[mode], MEASURES) for mode in ("exact", "packed")}
    numbers = f"exact {_number(drifts['exact'])}, packed {_number(drifts['packed'])}"
    if max(drifts.values()) <= ROUNDING:
        return (
            f"Up to {most} pads exact masking and packed execution do not drift: {numbers} at most, which is rounding."
        )
    return f"Exact masking or packed execution drifts by more than rounding ({_number(ROUNDING)}): {numbers} at most."


def _growth(pads: Sequence[int], mode: dict[str, Any], measure: str, direction: str, side: str) -> str:
    """How the drift without PSM goes on as pads are added; the paper has it increase."""
    drifts = [(n, drift) for n, drift in zip(pads, mode[measure]["mean"], strict=True) if n]
    (fewest, first), (most, last) = drifts[0], drifts[-1]
    unsettled = [i for i, (_, drift) in enumerate(drifts) if not _same(drift, last)]
    settled = drifts[unsettled[-1] + 1][0] if unsettled else fewest
    if max(first, last) <= ROUNDING:
        how = "that is rounding"
    elif not unsettled:
        how = "it does not grow, unlike in the paper"
    elif last < first:
        how = "it falls, unlike in the paper"
    elif settled < most:
        how = f"it grows up to {_pads(settled)} and then no more, as in the paper in part"
    else:
        how = "it grows, as in the paper"
    why = ""
    if measure in OF_TOKENS and settled < most and max(first, last) > ROUNDING:
        why = (
            "; only the convolution's neighbours on the right bring pads to a token, and T layers leave pads out"
            if (direction, side) == ("forward", "right")
            else "; a scan's state decays, so that the nearest pads count most"
        )
    return (
        f"Without PSM {MEASURES[measure]} drifts by {_number(first)} at {_pads(fewest)} and by {_number(last)} at "
        f"{_pads(most)}: {how}{why}."
    )


def _pre_against_post(vector: str, pre: float, post: float, most: int) -> str:
    numbers = f"At {most} pads pre-masking lets {vector} drift by {_number(pre)}, post-masking by {_number(post)}: "
    after_pre = "the convolution's bias, and a state that decays at pads"
    after_post = "the β that the next LayerNorm makes of a zero, and the pads' embeddings in the first block"
    if _same(pre, post):
        return numbers + "neither is better, unlike in the paper."
    if pre < post:
        return numbers + f"post is worse, unlike in the paper: it leaves {after_post}."
    return (
        numbers + f"post is better, as in the paper: pre leaves {after_pre}, which weigh more here than what post does."
    )


def _both_against_pre(modes: dict[str, Any]) -> str:
    """Whether pre+post moves tokens otherwise than pre does, anywhere."""
    gap = max(
        abs(one - other)
        for measure in OF_TOKENS
        for statistic in ("mean", "max")
        for one, other in zip(modes["pre"][measure][statistic], modes["pre+post"][measure][statistic], strict=True)
    )
    if gap <= ROUNDING:
        return (
            f"Pre+post moves tokens as pre alone does (drifts differ by {_number(gap)} at most) and not less, unlike "
            "in the paper: T layers leave pads out and mixers are masked before, so that no token reads what the mask "
            "after the block zeroes."
        )
    return (
        f"Pre+post and pre differ on tokens by up to {_number(gap)}, which Eqs. 1 to 3 exclude while T layers leave "
        "pads out: something else reads them."
    )


def _all_positions(pre: dict[str, float], post: dict[str, float], both: dict[str, float], most: int) -> str:
    measure = "unmasked_mean"
    numbers = (
        f"At {most} pads {MEASURES[measure]} drifts by {_number(pre[measure])} with pre, {_number(post[measure])} with "
        f"post, {_number(both[measure])} with pre+post: "
    )
    if _same(pre[measure], post[measure]) or not both[measure] - ROUNDING <= post[measure] < pre[measure]:
        return numbers + "not the paper's order."
    tokens_too = post["mean"] < pre["mean"] and not _same(post["mean"], pre["mean"])
    return (
        numbers + "the paper's order, since the mask after the block zeroes the pads' own vectors in this mean"
        f"{'.' if tokens_too else ', and not because tokens move less.'}"
    )


def _largest(mode: dict[str, Any], measures: Iterable[str]) -> float:
    return max(max(mode[measure]["max"]) for measure in measures)


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= max(ROUNDING, SAME * max(one, other))


def _number(drift: float) -> str:
    return f"{drift:.1e}" if drift else "0"


def _pads(number: int) -> str:
    return f"{number} pad{'s' * (number != 1)}"
