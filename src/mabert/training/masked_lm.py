"""Any masked language model of transformers on packed rows, with its head at the labelled positions only.

Six of seven positions carry no label; a head over all of them would cost more than a small encoder. MaBERT does so by
itself, and tells apart the sequences that share a row; the others take rows that are one sequence each.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from mabert.data.mlm import IGNORED
from mabert.models import MaBertForMaskedLM


def takes_seq_idx(config: PreTrainedConfig) -> bool:
    """Whether models with this config tell apart sequences that share a row."""
    model: Any = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    return "seq_idx" in inspect.signature(model.forward).parameters


def labelled_logits(model: PreTrainedModel, inputs: Mapping[str, Any], labels_BL: Tensor) -> Tensor:
    """(labels, V), in row order: what the model says of the positions that carry a label."""
    if isinstance(model, MaBertForMaskedLM):
        return model(**inputs, labels=labels_BL, labelled_only=True).logits
    with head_at(labels_BL != IGNORED, model):
        return model(**{name: value for name, value in inputs.items() if name != "seq_idx"}).logits[0]


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
