"""The encoders that are compared, as configs with random weights: MaBERT, its variants, and the paper's baselines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    BertConfig,
    BigBirdConfig,
    DebertaV2Config,
    LongformerConfig,
    ModernBertConfig,
    PreTrainedConfig,
)

from mabert.config import CHOICES
from mabert.experiments.scales import LAYERS, LETTERS, Scale, mabert_config
from mabert.training.objectives import objective_of

STEP = 4  # of the FFN's width, where it is chosen
LONGFORMER_GLOBAL = "_global."
"""In the names of Longformer's projections for tokens that attend globally: none in masked language modelling, [CLS] in
classification."""
# What the published checkpoints take, where it is not 512.
PUBLISHED_LONGEST = {"Longformer": 4096, "BigBird": 4096, "ModernBERT": 8192}


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know of its tokenizer."""

    size: int
    pad_token_id: int = 0
    cls_token_id: int = 2
    sep_token_id: int = 3


Build = Callable[[Scale, int, Vocabulary | None, int], PreTrainedConfig]
"""(scale, width of the FFN, vocabulary or None for the model's own, longest sequence) -> config"""


def _common(scale: Scale, ffn: int, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """What all of transformers' configs call by the same name."""
    choices: dict[str, Any] = {
        "hidden_size": scale.hidden_size,
        "num_attention_heads": scale.num_attention_heads,
        "num_hidden_layers": LAYERS,
        "intermediate_size": ffn,
        "initializer_range": scale.initializer_range,
    }
    if vocabulary:
        choices |= {
            "vocab_size": vocabulary.size,
            "pad_token_id": vocabulary.pad_token_id,
            "bos_token_id": vocabulary.cls_token_id,
            "eos_token_id": vocabulary.sep_token_id,
        }
    return choices


# The paper's dropout for everyone, whatever each library default is.
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def _mabert(
    choices: dict[str, Any], scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int
) -> PreTrainedConfig:
    words = {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad_token_id} if vocabulary else {}
    return mabert_config(scale, **choices, **words, intermediate_size=ffn, max_position_embeddings=longest)


def _bert(scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int) -> PreTrainedConfig:
    return BertConfig(**_common(scale, ffn, vocabulary), **DROPOUT, max_position_embeddings=longest)


def _albert(scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int) -> PreTrainedConfig:
    return AlbertConfig(
        **_common(scale, ffn, vocabulary),
        **DROPOUT,
        embedding_size=min(128, scale.hidden_size),
        max_position_embeddings=longest,
    )


def _longformer(scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int) -> PreTrainedConfig:
    # CHOICE: below base the window is the first stage's length: it pads every row to a multiple of the window
    window = min(512, scale.stage_lengths[0]) if scale.match_parameters else 512
    common = {"vocab_size": 50_265} | _common(scale, ffn, vocabulary)
    offset = 1 + (vocabulary.pad_token_id if vocabulary else 1)  # positions begin after the pad's id
    return LongformerConfig(
        **common, **DROPOUT, attention_window=[window] * LAYERS, max_position_embeddings=longest + offset,
        type_vocab_size=1,
    )  # fmt: skip


def _big_bird(scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int) -> PreTrainedConfig:
    return BigBirdConfig(
        **_common(scale, ffn, vocabulary), **DROPOUT, attention_type="block_sparse", max_position_embeddings=longest
    )


def _deberta(scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int) -> PreTrainedConfig:
    # what the published v3 has, some of it unknown to the config's own signature
    v3: dict[str, Any] = {
        "vocab_size": 128_100,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return DebertaV2Config(**v3 | _common(scale, ffn, vocabulary) | DROPOUT, max_position_embeddings=longest)


def _modernbert(scale: Scale, ffn: int, vocabulary: Vocabulary | None, longest: int) -> PreTrainedConfig:
    common = _common(scale, ffn, vocabulary)
    if not scale.match_parameters:  # its own published shape, which is deeper and has narrower gated FFNs
        common |= {"num_hidden_layers": 22, "intermediate_size": 1152}
    if vocabulary:
        common |= {"cls_token_id": vocabulary.cls_token_id, "sep_token_id": vocabulary.sep_token_id}
    common |= {f"{place}_dropout": 0.1 for place in ("embedding", "attention", "mlp", "classifier")}
    return ModernBertConfig(**common, max_position_embeddings=longest)


BASELINES: dict[str, Build] = {
    "BERT": _bert,
    "ALBERT": _albert,
    "Longformer": _longformer,
    "BigBird": _big_bird,
    "DeBERTa": _deberta,
}
"""The paper's five."""

MABERTS = {
    "MaBERT" if (direction, conv) == ("forward", "centered") else f"MaBERT-{direction}-{conv}": {
        "scan_direction": direction,
        "conv_mode": conv,
    }
    for direction in CHOICES["scan_direction"]
    for conv in CHOICES["conv_mode"]
}
"""In each scan direction, with each convolution; MaBERT itself is forward and centred."""


def builder(name: str) -> Build:
    """The function that makes the config of an architecture: a name of `MABERTS` or `BASELINES`, "ModernBERT", or a
    pattern of twelve letters, "+rope" behind it for rotary positions instead of learned ones.

    Raises:
        ValueError: there is none of that name.
    """
    if name in BASELINES:
        return BASELINES[name]
    if name == "ModernBERT":
        return _modernbert
    if name in MABERTS:
        return partial(_mabert, MABERTS[name])
    pattern, _, positions = name.partition("+")
    if len(pattern) == LAYERS and set(pattern) <= set(LETTERS) and positions in ("", "rope"):
        return partial(_mabert, {"pattern": pattern} | ({"position_embedding_type": "rope"} if positions else {}))
    raise ValueError(
        f"there is no architecture {name!r}. There are {', '.join([*MABERTS, *BASELINES, 'ModernBERT'])}, and patterns "
        f"of {LAYERS} letters M, T and P."
    )


def architecture(
    name: str, scale: Scale, vocabulary: Vocabulary | None = None, longest: int | None = None
) -> PreTrainedConfig:
    """The config of an architecture at a scale.

    Below base the width of its FFN is chosen so that it has as many parameters outside the embeddings as MaBERT, of
    MaBERT's own variants at base too; of ALBERT the unshared ones count, so that it has the same width and not the
    same size.

    Args:
        vocabulary: that of the common tokenizer; without it each model has its own published size.
        longest: tokens of the longest sequence; by default the last stage's length.
    """
    longest = longest or max(scale.stage_lengths)
    build = builder(name)
    ffn = scale.intermediate_size
    if name != "MaBERT" and (scale.match_parameters or name in MABERTS):
        target = encoder_parameters(builder("MaBERT")(scale, ffn, vocabulary, longest))
        ffn = matching_width(target, lambda width: encoder_parameters(build(scale, width, vocabulary, longest)))
        if ffn < STEP:
            raise ValueError(f"{name} cannot be made as small as MaBERT at scale {scale.name}: widen the FFN.")
    return build(scale, ffn, vocabulary, longest)


def matching_width(target: int, parameters: Callable[[int], int], step: int = STEP) -> int:
    """The width of the FFN, 64 and a multiple of `step`, at which a model comes nearest to so many parameters."""
    low, high = parameters(64), parameters(128)
    return 64 + step * round((target - low) / (high - low) * 64 / step)


def encoder_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model without embedding tables, head and pooler; of ALBERT as if its layers shared nothing, of
    Longformer without the projections of global attention, which pretraining does not reach."""
    with torch.device("meta"):
        encoder = objective_of(config).auto_class.from_config(config).base_model
    tables = {id(p) for module in encoder.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    total = 0
    for name, parameter in encoder.named_parameters():
        if id(parameter) in tables or name.startswith("pooler") or LONGFORMER_GLOBAL in name:
            continue
        shared = config.model_type == "albert" and "albert_layer_groups" in name
        total += parameter.numel() * (config.num_hidden_layers if shared else 1)
    return total
