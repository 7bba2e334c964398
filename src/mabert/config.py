"""The configuration of a MaBERT encoder: a pattern of layers and every other choice, in one place."""

import math
from collections.abc import Container
from typing import Any, Literal, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LAYER_KINDS = {"M": "linear_attention", "T": "full_attention", "P": "hybrid"}

FUSIONS = ("mean", "gate", "merge-attention", "scaled", "concat", "merge-attention-swapped")
"""Ways to make one output of attention and SSM side by side."""

CHOICES = {
    "position_embedding_type": ("absolute", "rope", "none"),
    "conv_mode": ("centered", "causal"),
    "scan_direction": ("forward", "backward", "alternating", "bidirectional"),
    "psm": ("none", "pre", "post", "pre+post", "exact"),
    "pooling": ("map", "attention", "cls", "mean"),
    "execution": ("packed", "padded"),
    "fusion": FUSIONS,
}

CAUSAL_ONLY = ("decay_range", "mamba_head_size", "rms_norm_eps", "sliding_window", "ssm", "transpoints")
"""Choices of the causal models that MaBERT has no use for."""


def check_depth(pattern: str, given: int | None) -> None:
    """Raise ValueError where a number of layers is given that is not the pattern's."""
    if given is not None and given != len(pattern):
        raise ValueError(
            f"num_hidden_layers={given} contradicts pattern {pattern!r} of {len(pattern)} layers. "
            "Leave num_hidden_layers out: the pattern alone says how many layers there are."
        )


def check_letters(pattern: str, known: Container[str], meaning: str) -> None:
    """Raise ValueError, with what the letters mean, where the pattern is empty or has one that is not known."""
    unknown = sorted({letter for letter in pattern if letter not in known})
    if unknown or not pattern:
        found = f"unknown letter{'s' * (len(unknown) > 1)} {', '.join(unknown)}" if unknown else "no letter"
        raise ValueError(f"pattern {pattern!r} has {found}. Write one letter a layer: {meaning}.")


@strict
class MaBertConfig(PreTrainedConfig):
    """Configuration of `MaBertModel` and its heads (arXiv 2603.03001).

    Args:
        pattern: one letter a layer, first layer first: `M` (Mamba), `T` (Transformer) or `P` (both side by side on the
            same input, fused). Its length is `num_hidden_layers`.
        conv_mode: what the depthwise convolution of a Mamba sees: `"centered"` (kernel 4: one neighbour to the left,
            two to the right) or `"causal"` (three to the left).
        scan_direction: `"forward"`, `"backward"` (the whole mixer flipped within each sequence), `"alternating"`
            (M and P layers take turns, forward first) or `"bidirectional"` (both directions in every M or P layer,
            sharing the in and out projections).
        psm: padding-safe masking, `"exact"`, or one of the paper's ablations `"none" "pre" "post" "pre+post"`; all but
            `"exact"` need `execution="padded"`.
        pooling: sentence representation of the classification head: `"map"` (mask-aware attention pooling), `"cls"`,
            `"mean"` (over valid tokens), or `"attention"` (attention pooling without a mask, the paper's ATTN; needs
            `execution="padded"`).
        execution: `"packed"` runs on real tokens only; `"padded"` keeps static shapes.
        time_step_rank: rank R of the step-size projection; `"auto"` is ceil(hidden_size / 16).
        time_step_min, time_step_max, time_step_floor: the initial step sizes are log-uniform in [min, max], at least
            floor.
        fusion: what makes one output of the two branches of a `P` layer: `"mean"` of their norms, `"gate"` from the
            layer's input, `"merge-attention"` (queries from attention, keys and values from Mamba, or
            `"merge-attention-swapped"`), `"scaled"` or `"concat"`.
        position_embedding_type: `"absolute"` (learned), `"rope"` (on the queries and keys of T and P layers,
            base `rope_parameters["rope_theta"]`) or `"none"`.
        max_position_embeddings: the longest sequence, in tokens.

    The remaining fields mean what they mean in `BertConfig` and `MambaConfig`.

    Raises:
        ValueError: a value is outside its choices, two values contradict each other, or one is a causal model's.
    """

    model_type = "mabert"
    keys_to_ignore_at_inference = ()

    # CHOICE: BERT's vocabulary size, hidden size, heads, FFN and activation for base
    vocab_size: int = 30522
    hidden_size: int = 768
    pattern: str = "MMTMMTMMTMMT"
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    max_position_embeddings: int = 512
    position_embedding_type: str = "absolute"
    type_vocab_size: int = 2
    # CHOICE: Mamba-1's state size, kernel, expansion and step sizes
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | Literal["auto"] = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # CHOICE: centred convolution, since the paper reports leaks of end padding through it, which a causal one has not
    conv_mode: str = "centered"
    scan_direction: str = "forward"
    psm: str = "exact"
    pooling: str = "map"
    execution: str = "packed"
    fusion: str = "mean"
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    rope_parameters: Any = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_depth(self.pattern, kwargs.pop("num_hidden_layers", None))
        kwargs.pop("layer_types", None)
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self._check_pattern()
        super().__post_init__(**kwargs)
        self.check()

    def _check_pattern(self) -> None:
        meaning = "M (Mamba), T (Transformer) or P (both side by side), as in MMTMMTMMTMMT"
        check_letters(self.pattern, LAYER_KINDS, meaning)

    def check(self) -> None:
        """Raise ValueError where a value is outside its choices or contradicts another one."""
        self._check_pattern()
        for name in CAUSAL_ONLY:
            if (unused := getattr(self, name, None)) is not None:
                raise ValueError(
                    f"{name}={unused!r} is a choice of the causal models and would change nothing here. "
                    "Leave it out, or take HybridConfig or TransMambaConfig."
                )
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        for name in [
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "state_size",
            "conv_kernel",
            "expand",
            "time_step_rank",
        ]:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be divided among {self.num_attention_heads} attention heads. "
                "Choose num_attention_heads so that it divides hidden_size."
            )
        if self.position_embedding_type == "rope":
            if (self.hidden_size // self.num_attention_heads) % 2:
                raise ValueError(
                    f"position_embedding_type='rope' rotates pairs of features, but each head has "
                    f"{self.hidden_size // self.num_attention_heads} of them. Choose an even head size."
                )
            if (rope_type := self.rope_parameters["rope_type"]) != "default":
                raise ValueError(
                    f"rope_type {rope_type!r} is not supported, only 'default' is. "
                    "Raise rope_theta in rope_parameters to reach longer contexts."
                )
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min={self.time_step_min} and time_step_max={self.time_step_max} must fulfil "
                "0 < time_step_min <= time_step_max."
            )
        if self.execution == "packed":
            for name, value, needs_pads in (
                ("psm", self.psm, self.psm != "exact"),
                ("pooling", self.pooling, self.pooling == "attention"),
            ):
                if needs_pads:
                    raise ValueError(
                        f"{name}={value!r} says what to do with pads, but execution='packed' never computes on any. "
                        "Set execution='padded' beside it."
                    )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is outside the vocabulary of {self.vocab_size} tokens.")

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers: the length of `pattern`."""
        return len(self.pattern)

    @property
    def layer_types(self) -> list[str]:
        """The pattern in transformers' words, one entry a layer."""
        return [LAYER_KINDS[letter] for letter in self.pattern]

    @property
    def inner_size(self) -> int:
        """E, the width of a Mamba's recurrence: `expand * hidden_size`."""
        return self.expand * self.hidden_size

    @property
    def head_size(self) -> int:
        """P, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def scan_directions(self) -> list[str | None]:
        """Direction of each layer's scan, `None` for T layers; "alternating" counts the layers that scan only."""
        directions: list[str | None] = []
        seen = 0
        for letter in self.pattern:
            if letter == "T":
                directions.append(None)
                continue
            if self.scan_direction == "alternating":
                directions.append(("forward", "backward")[seen % 2])
            else:
                directions.append(self.scan_direction)
            seen += 1
        return directions

    @classmethod
    def base(cls, **overrides: Any) -> Self:
        """The paper's size: hidden 768, 12 heads, FFN 3072."""
        return cls(**overrides)

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """Hidden 512, 8 heads, FFN 2048."""
        return cls(**{"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048} | overrides)

    @classmethod
    def mini(cls, **overrides: Any) -> Self:
        """Hidden 256, 4 heads, FFN 1024."""
        return cls(**{"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024} | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Hidden 128, 2 heads, FFN 512."""
        return cls(**{"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512} | overrides)
