"""What every model checks in what it is given, before anything is computed from it.

Shape suffixes: B batch, L length, H hidden.
"""

from torch import Tensor

from mabert.ops import SequenceLayout

IGNORED = -100
"""The label of a token at which nothing is to be predicted."""


def given_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Token ids (B, L) or embeddings (B, L, H), whichever is given.

    Raises:
        ValueError: both or neither are given, or what is given has another shape or no token.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    name, axes = ("input_ids", "BL") if inputs_embeds is None else ("inputs_embeds", "BLH")
    if given.ndim != len(axes) or not given.shape[1]:
        raise ValueError(
            f"{name} must have shape ({', '.join(axes)}) with at least one token, not {tuple(given.shape)}."
        )
    return given


def check_token_labels(labels_BL: Tensor, layout: SequenceLayout) -> None:
    """Raise ValueError unless there is a whole number for every token of the batch."""
    shape = (layout.batch_size, layout.length)
    if labels_BL.shape != shape or labels_BL.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape {shape}, one for each token, not {labels_BL.dtype} of shape "
            f"{tuple(labels_BL.shape)}."
        )
