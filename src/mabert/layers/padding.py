"""Padding-safe masking (PSM): which places of the encoder zero the pads in padded execution.

Packed execution computes on no pad, so nothing is masked there.
"""

from dataclasses import dataclass

from torch import Tensor

from mabert.ops import SequenceLayout


@dataclass(frozen=True)
class PaddingSafeMasking:
    """The places a psm mode masks.

    Attributes:
        embeddings: the embedding output, before the first LayerNorm reads it.
        before_ssm: the input of the SSM (Eq. 2).
        inside_ssm: the convolution's input and output, and Δ = 0 at pads, so that the state passes them unchanged.
        after_block: the output of each M or P layer (Eq. 3) and of the encoder.
    """

    embeddings: bool = False
    before_ssm: bool = False
    inside_ssm: bool = False
    after_block: bool = False


PSM = {
    "none": PaddingSafeMasking(),
    "pre": PaddingSafeMasking(before_ssm=True),
    "post": PaddingSafeMasking(after_block=True),
    "pre+post": PaddingSafeMasking(before_ssm=True, after_block=True),
    # CHOICE: the default masks inside the mixer too: the paper's two masks leave the conv's bias and a decaying state
    "exact": PaddingSafeMasking(embeddings=True, before_ssm=True, inside_ssm=True, after_block=True),
}


def zero_pads(x: Tensor, layout: SequenceLayout) -> Tensor:
    """x with pads zeroed, whatever they hold (a product would keep NaN): (B, L, H) when padded, (T, H) as it is."""
    if layout.packed or layout.mask_BL is None:
        return x
    # PAPER Eq. 10: the token form of the masks, x_t <- m_t x_t
    return x.where(layout.mask_BL.unsqueeze(-1), x.new_zeros(()))
