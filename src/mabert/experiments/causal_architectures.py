"""The causal language models that are compared, as configs with random weights, all of one size."""

from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedConfig

from mabert.causal_config import TRANSPOINTS, HybridConfig, TransMambaConfig
from mabert.config import FUSIONS
from mabert.experiments.architectures import Vocabulary, encoder_parameters, matching_width
from mabert.experiments.scales import HYBRID_NAMES


class CausalSize(Protocol):
    """What of a scale says how large its causal models are."""

    @property
    def hidden_size(self) -> int:
        """H."""

    @property
    def num_attention_heads(self) -> int:
        """K."""

    @property
    def intermediate_size(self) -> int:
        """Width of the FFN of the model that the others are made as large as."""

    @property
    def layers(self) -> int:
        """Mixers in a model; a layer that has two counts twice."""

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""


@dataclass(frozen=True)
class Hybrid:
    """Layers of attention and SSM."""

    letters: str
    """A piece of the pattern, which is repeated."""
    fusion: str = "mean"

    def pattern(self, mixers: int) -> str:
        """So many mixers in all."""
        in_piece = sum(1 if letter in "TM" else 2 for letter in self.letters)
        return self.letters * (mixers // in_piece)


ALONE = {"Transformer": Hybrid("T"), "Mamba-2": Hybrid("M")}
CAUSAL_REFERENCES = {**ALONE, "Hybrid": Hybrid("MMMT")}
"""What TransMamba is compared with."""

HYBRIDS = {
    **ALONE,
    "sequential": Hybrid("S"),
    "sequential-attention-first": Hybrid("A"),
    **{f"parallel-{fusion}": Hybrid("P", fusion) for fusion in FUSIONS},
}
"""Attention and SSM one after the other, or side by side, and each alone: the comparison is that of arXiv 2510.26912,
sizes and all fusions but that by attention are ours."""
assert tuple(HYBRIDS) == HYBRID_NAMES


def transmamba_name(schedule: str) -> str:
    """Of a TransMamba with one of the paper's schedules."""
    return f"TransMamba-{schedule}"


def causal_architecture(
    name: str,
    size: CausalSize,
    vocabulary: Vocabulary | None = None,
    longest: int | None = None,
    state_size: int | None = None,
    ssm: str = "mamba2",
    sliding_window: int | None = None,
) -> PreTrainedConfig:
    """The config of a causal language model: TransMamba-V1 to -V9, or a name of `CAUSAL_REFERENCES` or `HYBRIDS`.

    The width of the others' FFN is chosen so that they have as many parameters outside the embeddings as TransMamba.

    Args:
        longest: tokens of the longest sequence, of which a schedule's TransPoints are shares; by default the size's.
        state_size: of the hybrids' SSM; by default as wide as attention's heads.
        ssm: of the hybrids, also of the one that is named Mamba-2: "mamba2" or "mamba1".
        sliding_window: tokens that the hybrids' attention reaches; all of them by default.

    Raises:
        ValueError: there is none of that name, or it cannot be made so small.
    """
    common: dict[str, Any] = {
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_attention_heads,
        "max_position_embeddings": longest or size.length,
        "initializer_range": 0.02 * (768 / size.hidden_size) ** 0.5,
    }
    if vocabulary:
        common |= {
            "vocab_size": vocabulary.size,
            "pad_token_id": vocabulary.pad_token_id,
            "bos_token_id": vocabulary.cls_token_id,
            "eos_token_id": vocabulary.sep_token_id,
        }

    def transmamba(schedule: str) -> PreTrainedConfig:
        ffn = size.intermediate_size
        return TransMambaConfig(**common, intermediate_size=ffn, num_hidden_layers=size.layers, transpoints=schedule)

    schedule = name.removeprefix(transmamba_name(""))
    if schedule in TRANSPOINTS:
        return transmamba(schedule)
    known = HYBRIDS | CAUSAL_REFERENCES
    if name not in known:
        names = [*known, *map(transmamba_name, TRANSPOINTS)]
        raise ValueError(f"there is no causal architecture {name!r}. There are {', '.join(names)}.")
    hybrid = known[name]

    def other(ffn: int) -> PreTrainedConfig:
        # CHOICE: Mamba-2's heads and state as wide as attention's heads, so that all hold as much in a head
        width = size.hidden_size // size.num_attention_heads
        pattern = hybrid.pattern(size.layers)
        return HybridConfig(
            **common,
            intermediate_size=ffn,
            pattern=pattern,
            fusion=hybrid.fusion,
            mamba_head_size=width,
            state_size=state_size or width,
            ssm=ssm,
            sliding_window=sliding_window,
        )

    target, step = encoder_parameters(transmamba("V9")), max(1, size.hidden_size // 32)
    ffn = matching_width(target, lambda ffn: encoder_parameters(other(ffn)), step)
    if ffn < step:
        raise ValueError(f"{name} cannot be made as small as TransMamba of this size: widen the FFN.")
    return other(ffn)
