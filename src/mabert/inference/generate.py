"""A text continued by a causal model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from mabert.inference.loading import (
    ModelFolderError,
    default_device,
    load_config,
    load_matching_tokenizer,
    load_model,
)


def generate(
    texts: Sequence[str],
    model_folder: str | Path,
    *,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    transpoints: str | Sequence[int] | None = None,
) -> list[str]:
    """Each text with what the model goes on with, up to the end of a document; all of them at once.

    Args:
        max_new_tokens: of each text, at most.
        temperature: 0 takes the most probable token each time; above it tokens are drawn, from sharper (below 1) or
            flatter (above 1) probabilities than the model's.
        top_p: draw among the most probable tokens only that have this much probability together.
        seed: of the draws.
        transpoints: of a TransMamba, another schedule than in training.

    Raises:
        ModelFolderError: the folder cannot be used, or holds no causal language model.
        ValueError: there are no texts, or a number is out of its range.
    """
    if not texts:
        raise ValueError("there are no texts to go on with: give at least one, if only an empty one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if top_p < 1 and not temperature:
        raise ValueError(f"top_p={top_p} has no effect where nothing is drawn: give a temperature above 0 beside it")
    config = load_config(model_folder, **({} if transpoints is None else {"transpoints": transpoints}))
    if not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None):
        raise ModelFolderError(
            f"{model_folder} holds a {config.model_type} model, which is no causal language model: name the folder of "
            "one that predicts next tokens, as a TransMamba's"
        )
    tokenizer = load_matching_tokenizer(model_folder, config)
    model: Any = load_model(AutoModelForCausalLM, model_folder, config)
    model.to(default_device())
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True).to(model.device)
    choices: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    if temperature:
        choices |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = model.generate(**inputs, **({"do_sample": False} | choices))
    added = ids[:, inputs["input_ids"].shape[1] :]
    return [
        text + end for text, end in zip(texts, tokenizer.batch_decode(added, skip_special_tokens=True), strict=True)
    ]
