"""What a language model is trained for: masked tokens, or each next one; and how any model of transformers is.

Heads work at the positions that count only. Our models do so by themselves, and tell apart the sequences that share a
row; the others take rows that are one sequence each.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mabert.data.mlm import IGNORED, MlmDataset
from mabert.data.next_token import NextTokenDataset
from mabert.data.rows import Rows
from mabert.models import MaBertForMaskedLM
from mabert.models.causal import CausalForLM


@dataclass(frozen=True)
class Objective:
    """One of the two."""

    name: str
    """Of what is predicted."""
    auto_class: Any
    mapping: Any
    """transformers' models for it, by config."""

    @property
    def is_masked(self) -> bool:
        """Whether tokens are masked, rather than read one after the other."""
        return self is MASKED

    def dataset(
        self, rows: Sequence[Rows], tokenizer: PreTrainedTokenizerFast, *, seed: int, mlm_probability: float
    ) -> Dataset:
        """Samples of these rows, by (stage, epoch, index)."""
        if self.is_masked:
            return MlmDataset(rows, tokenizer, seed=seed, mlm_probability=mlm_probability)
        return NextTokenDataset(rows)


MASKED = Objective("masked tokens", AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING)
NEXT_TOKEN = Objective("next tokens", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)


def objective_of(config: PreTrainedConfig) -> Objective:
    """What models with this config are trained for: masked tokens where they can be.

    Raises:
        ValueError: transformers has no language model for it.
    """
    for objective in (MASKED, NEXT_TOKEN):
        if objective.mapping.get(type(config), None):
            return objective
    raise ValueError(f"transformers has no language model, masked or causal, for model_type={config.model_type!r}.")


def takes_seq_idx(config: PreTrainedConfig) -> bool:
    """Whether models with this config tell apart sequences that share a row."""
    model: Any = objective_of(config).mapping[type(config)]
    return "seq_idx" in inspect.signature(model.forward).parameters


def computes_own_loss(model: PreTrainedModel) -> bool:
    """Whether the model's own loss is taken, as its share of the batch's mean; otherwise `loss_at_labels`."""
    return isinstance(model, MaBertForMaskedLM | CausalForLM) or not objective_of(model.config).is_masked


def labelled_logits(model: PreTrainedModel, inputs: Mapping[str, Any], labels_BL: Tensor) -> Tensor:
    """(labels, V), in row order: what the model says of the positions that carry a label."""
    if isinstance(model, MaBertForMaskedLM | CausalForLM):
        return model(**inputs, labels=labels_BL, labelled_only=True).logits
    known = {name: value for name, value in inputs.items() if name != "seq_idx"}
    if not objective_of(model.config).is_masked:
        return model(**known, use_cache=False).logits[:, :-1][labels_BL[:, 1:] != IGNORED]
    with head_at(labels_BL != IGNORED, model):
        return model(**known).logits[0]


@contextmanager
def head_at(places_BL: Tensor, model: PreTrainedModel) -> Iterator[None]:
    """Let the head see these places of the encoder's output as one row: it works place by place."""

    def select(encoder: nn.Module, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[places_BL][None]
        return output

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def loss_at_labels(outputs: Any, labels_BL: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """This micro-batch's share of the batch's mean loss, from logits under `head_at`."""
    targets = labels_BL[labels_BL != IGNORED]
    return F.cross_entropy(outputs.logits[0].float(), targets, reduction="sum") / num_items_in_batch
