"""The configurations of the causal language models: TransMamba, and hybrids of attention and SSM."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from mabert.config import FUSIONS, check_depth, check_letters

# PAPER TransMamba: the schedules of Table 6, in tokens of a sequence of 8,192
TRANSPOINTS = {
    "V1": (2048,),
    "V2": (4096,),
    "V3": (6144,),
    "V4": (3072, 4096, 5120),
    "V5": (2048, 3072, 4096),
    "V6": (512, 1024, 2048),
    "V7": (2048, 4096, 6144),
    "V8": (0, 1024, 2048, 6144, 8192),
    "V9": (0, 128, 256, 512, 1024, 2048, 4096, 8192),
}
TRANSPOINT_LENGTH = 8192


@strict
class CausalConfig(PreTrainedConfig):
    """What the causal models have in common; the fields mean what they mean in `MaBertConfig`.

    Args:
        max_position_embeddings: the longest sequence that the model is made for, in tokens; longer ones run, too.
        time_step_min, time_step_max, time_step_floor: the initial step sizes of the SSM are log-uniform in [min, max],
            at least floor.
        decay_range: the initial -A of Mamba-2's heads is uniform between these two.
    """

    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 30522
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    # CHOICE: no dropout in language modelling, whose text is read about once
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    conv_kernel: int = 4
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    # CHOICE: as in Mamba-2
    decay_range: tuple[float | int, float | int] | list[float | int] = (1, 16)
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_parameters: Any = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError where a value is outside its range or contradicts another one."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "conv_kernel",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {share}.")
        for name in ("rms_norm_eps", "initializer_range", "time_step_floor"):
            if not (number := getattr(self, name)) >= 0:
                raise ValueError(f"{name} must not be negative, but is {number}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(map(repr, sorted(ACT2FN)))}.")
        if self.hidden_size % self.num_attention_heads or self.head_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} gives {self.num_attention_heads} heads no even whole size, which "
                "rotary positions need. Choose num_attention_heads so that hidden_size / num_attention_heads is even."
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
        if not 0 < self.decay_range[0] <= self.decay_range[1]:
            raise ValueError(f"decay_range={self.decay_range} must be two growing numbers above 0.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is outside the vocabulary of {self.vocab_size} tokens.")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@strict
class TransMambaConfig(CausalConfig):
    """Configuration of `TransMambaForCausalLM` (arXiv 2503.24067).

    Args:
        transpoints: the TransPoints of the layers, in tokens, repeated as often as there are layers: a list, or the
            name of one of the paper's schedules, "V1" to "V9", which are shares of `max_position_embeddings` (printed
            for 8,192). A token whose index in its sequence is below its layer's TransPoint is attended to, the others
            go through the SSM: 0 is an SSM alone, a TransPoint of at least the length is attention alone. It may be
            changed at any time, except below a cache. Of a list with more entries than layers the first are taken.

    Raises:
        ValueError: a value is outside its range, there is no schedule of that name, a list is empty or holds a
            negative number.
        StrictDataclassFieldValidationError: a value has another type, as transpoints=[1.5].
    """

    model_type = "transmamba"

    num_hidden_layers: int = 12
    transpoints: str | list[int] | tuple[int, ...] = "V9"

    def check(self) -> None:
        """Raise ValueError where a value is outside its range or contradicts another one."""
        super().check()
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, not {self.num_hidden_layers}.")
        self.layer_transpoints()

    def layer_transpoints(self) -> list[int]:
        """The TransPoint of each layer, in tokens."""
        points = self.transpoints
        if isinstance(points, str):
            if points not in TRANSPOINTS:
                raise ValueError(
                    f"there is no schedule transpoints={points!r}. There are {', '.join(TRANSPOINTS)}; or give a list "
                    "of tokens, one a layer, which is repeated."
                )
            # CHOICE: at other lengths than the paper's 8,192 the schedules keep their shares of the sequence
            points = [point * self.max_position_embeddings // TRANSPOINT_LENGTH for point in TRANSPOINTS[points]]
        if not points:
            raise ValueError("transpoints is empty: give at least one TransPoint, which all layers then share.")
        if wrong := [point for point in points if not isinstance(point, int)]:  # put into the list since it was checked
            raise ValueError(f"transpoints={points!r}: {wrong[0]!r} is no number of tokens, which is a whole one.")
        if min(points) < 0:
            raise ValueError(f"transpoints={points!r}: {min(points)} is no number of tokens, which is at least 0.")
        return [points[layer % len(points)] for layer in range(self.num_hidden_layers)]


HYBRID_LAYERS = {
    "T": "full_attention",
    "M": "linear_attention",
    "S": "hybrid",
    "A": "hybrid",
    "P": "hybrid",
}
SSMS = ("mamba2", "mamba1")


@strict
class HybridConfig(CausalConfig):
    """Configuration of `HybridForCausalLM`: layers of attention and SSM in any order (after arXiv 2510.26912).

    Args:
        pattern: one letter a layer, first layer first, each with a feed-forward network: `T` (attention), `M` (SSM),
            `S` (SSM, then attention), `A` (attention, then SSM) or `P` (both side by side, fused). Its length is
            `num_hidden_layers`.
        ssm: `"mamba2"` or `"mamba1"`.
        fusion: what makes one output of the two branches of a `P` layer: `"mean"` of their norms, `"gate"` from the
            layer's input, `"merge-attention"` (queries from attention, keys and values from the SSM, or
            `"merge-attention-swapped"`), `"scaled"` or `"concat"`. Other layers have no use for it.
        sliding_window: tokens that a token attends to, its own included; None for all before it. Of use where layers
            attend: all but `M`; merged attention has it as well.
        state_size: N, of the SSM.
        expand: the width of the SSM's recurrence, in hidden sizes.
        mamba_head_size: width of one head of Mamba-2.
        time_step_rank: rank of Mamba-1's step-size projection; `"auto"` is ceil(hidden_size / 16).

    Raises:
        ValueError: a letter, an SSM or a fusion is unknown, or a value is outside its range.
    """

    model_type = "mabert_hybrid"

    pattern: str = "MMMTMMMTMMMT"
    ssm: str = "mamba2"
    fusion: str = "mean"
    sliding_window: int | None = None
    # CHOICE: Mamba-2's state size, expansion and head
    state_size: int = 128
    expand: int = 2
    mamba_head_size: int = 64
    time_step_rank: int | Literal["auto"] = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        check_depth(self.pattern, kwargs.pop("num_hidden_layers", None))
        kwargs.pop("layer_types", None)
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self._check_pattern()
        super().__post_init__(**kwargs)

    def _check_pattern(self) -> None:
        meaning = "T (attention), M (SSM), S (SSM, then attention), A (attention, then SSM) or P (both, fused)"
        check_letters(self.pattern, HYBRID_LAYERS, f"{meaning}, as in MMMTMMMT")

    def check(self) -> None:
        """Raise ValueError where a value is outside its range or contradicts another one."""
        self._check_pattern()
        super().check()
        for name, allowed in (("ssm", SSMS), ("fusion", FUSIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        for name in ("state_size", "expand", "mamba_head_size", "time_step_rank"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 token, or None for all, not {self.sliding_window}.")
        has_heads = self.ssm == "mamba2" and set(self.pattern) != {"T"}
        if has_heads and self.inner_size % self.mamba_head_size:
            raise ValueError(
                f"Mamba-2's width {self.inner_size} (expand * hidden_size) is no multiple of mamba_head_size "
                f"{self.mamba_head_size}. Choose a head size that divides it."
            )

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers: the length of `pattern`."""
        return len(self.pattern)

    @property
    def layer_types(self) -> list[str]:
        """The pattern in transformers' words, one entry a layer."""
        return [HYBRID_LAYERS[letter] for letter in self.pattern]

    @property
    def inner_size(self) -> int:
        """E, the width of the SSM's recurrence."""
        return self.expand * self.hidden_size
