"""Model folders: read whole or refused. transformers would leave a missing weight random and only log it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mabert.data.tokenizer import load_tokenizer


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message says why and what to do."""


def load_config(folder: str | Path, **overrides: Any) -> PreTrainedConfig:
    """Read the model config of a folder; `overrides` replace its fields.

    Raises:
        ModelFolderError: it is not a model folder, or has no field of that name.
        ValueError: the overridden config contradicts itself.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        inside = sorted(path.parent for path in folder.glob("*/config.json") if _is_model_config(path))
        hint = f"did you mean {inside[-1]}?" if inside else "name the folder that pretraining or fine-tuning wrote"
        raise ModelFolderError(f"{folder} is not a model folder, it {what}: {hint}")
    config = AutoConfig.from_pretrained(folder)
    if unknown := sorted(set(overrides) - set(config.to_dict())):
        raise ModelFolderError(f"the {config.model_type} model in {folder} has no setting {', '.join(unknown)}")
    return type(config).from_dict(config.to_dict() | overrides)


def load_model(
    auto_class: Any, folder: str | Path, config: PreTrainedConfig | None = None, *, new_head: bool = False
) -> PreTrainedModel:
    """Load the fp32 weights of a folder into `auto_class` (AutoModel, AutoModelForMaskedLM, …), in eval mode.

    Raises:
        ModelFolderError: it is not a model folder, weights cannot be read, weights of the encoder are missing or do
            not fit its config, or weights of the head are missing and `new_head` does not allow for that.
    """
    folder = Path(folder)
    config = config or load_config(folder)
    try:
        with _quiet():
            model, info = auto_class.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise ModelFolderError(f"the weights in {folder} cannot be read ({error}): copy or write them again") from error

    mismatched = {key for key, *_ in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | mismatched
    foreign = {key for key in missing | set(info["unexpected_keys"]) if _in_encoder(model, key)}
    if foreign:
        raise ModelFolderError(
            f"the weights in {folder} do not belong to its config.json: {len(foreign)} of the encoder's are missing, "
            f"left over or of another shape ({', '.join(sorted(foreign)[:3])}, …). Restore the config.json that was "
            "written with them"
        )
    if missing and not new_head and model.base_model is not model:
        raise ModelFolderError(
            f"{folder} holds no trained {type(model).__name__}, its config says "
            f"{', '.join(config.architectures or ['nothing'])}; missing: {', '.join(sorted(missing)[:3])}"
        )
    return model


def load_matching_tokenizer(folder: str | Path, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder; one whose ids do not fit the model's embeddings is refused."""
    tokenizer = load_tokenizer(folder)
    # Embeddings may be padded up to a multiple of 128, as in ModernBERT and DeBERTa-v3.
    if not 0 <= config.vocab_size - len(tokenizer) < 128:
        raise ModelFolderError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model's embeddings {config.vocab_size}: they "
            "were not made together. Put the tokenizer there that the model was pretrained with"
        )
    if getattr(config, "type_vocab_size", 0) < 2:  # the model knows no second segment
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def longest_sequence(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, wanted: int | None = None) -> int:
    """Tokens of the longest sequence, special ones included: `wanted`, by default all that the model takes.

    Raises:
        ValueError: `wanted` is more than the model takes, or too little to hold a token of text.
    """
    # RoBERTa's kin count two positions more than they can use; their tokenizers know.
    limit = min(config.max_position_embeddings, tokenizer.model_max_length)
    if wanted is None:
        return limit
    if wanted > limit:
        raise ValueError(
            f"max_length={wanted} is over the model's maximum of {limit} tokens: lower it, or call "
            f"resize_position_embeddings({wanted}) on the encoder, save it, and raise the tokenizer's model_max_length"
        )
    if wanted < 4:
        raise ValueError(f"max_length={wanted} must be at least 4: two special tokens at least, and text")
    return wanted


def default_device() -> torch.device:
    """The accelerator (a GPU, say), where there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _in_encoder(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to the encoder and not to a head; BERT's pooler is a head, pretraining has none."""
    name = key.removeprefix(f"{model.base_model_prefix}.")
    is_part = name != key or name.split(".")[0] in dict(model.base_model.named_children())
    return is_part and not name.startswith("pooler.")


def _is_model_config(path: Path) -> bool:
    return '"model_type"' in path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own loading report and bar off the screen: `load_model` checks and says it."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
