"""What a pretrained model puts in place of a mask."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM

from mabert.inference.batches import Runner


@dataclass(frozen=True)
class Fill:
    """One token in place of one mask."""

    token: str
    probability: float
    text: str
    """The text with this mask filled; other masks stay."""


def fill_mask(text: str, model_folder: str | Path, *, top_k: int = 5) -> list[list[Fill]]:
    """The `top_k` most probable tokens, best first, for each mask of the text.

    Each mask is filled on its own, all of them predicted at once.

    Raises:
        ModelFolderError: the folder cannot be used, or holds no trained masked-language-modelling head.
        ValueError: the text has no mask or is too long for the model, or `top_k` is out of range.
    """
    runner = Runner(AutoModelForMaskedLM, model_folder)
    tokenizer, mask = runner.tokenizer, str(runner.tokenizer.mask_token)
    if mask not in text:
        raise ValueError(
            f"the text has no {mask}: write {mask} where a token is to be filled in, as in 'It is {mask}.'"
        )
    if not 1 <= top_k <= len(tokenizer):
        raise ValueError(f"top_k={top_k} must lie in 1 to {len(tokenizer)}, the size of the vocabulary")
    features, _ = runner.tokenize([text])
    inputs = {key: torch.tensor([value], device=runner.model.device) for key, value in features[0].items()}
    with torch.inference_mode():
        logits_BLV = runner.model(**inputs).logits
    at_masks = inputs["input_ids"][0] == tokenizer.mask_token_id
    # Embeddings may be padded beyond the tokenizer's last token.
    best = logits_BLV[0, at_masks, : len(tokenizer)].float().softmax(-1).topk(top_k)
    return [
        [
            Fill(token, probability, _filled(text, mask, index, token))
            for token, probability in zip(tokenizer.convert_ids_to_tokens(ids), probabilities, strict=True)
        ]
        for index, (ids, probabilities) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    ]


def _filled(text: str, mask: str, index: int, token: str) -> str:
    """The text with its mask number `index` replaced; a WordPiece continuation is joined to the word before it."""
    parts = text.split(mask)
    before, after = mask.join(parts[: index + 1]), mask.join(parts[index + 1 :])
    if token.startswith("##"):
        return before.rstrip() + token[2:] + after
    return before + token + after
