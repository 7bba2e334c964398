"""Sentence representations from token representations: MAP (Eqs. 11-13) and its rivals.

Shape suffixes: B batch, L length, T real tokens in all, S sequences, H hidden.
"""

import torch
from torch import Tensor, nn

from mabert.config import MaBertConfig
from mabert.ops import SequenceLayout


class Pooling(nn.Module):
    """One vector a sequence, by `config.pooling`; a sequence without tokens pools to zeros (except "attention")."""

    def __init__(self, config: MaBertConfig):
        super().__init__()
        self.kind = config.pooling
        self.scorer = nn.Linear(config.hidden_size, 1) if self.kind in ("map", "attention") else None

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """Encoder output, (T, H) packed or (B, L, H) padded, to (S, H)."""
        if self.kind == "attention":
            assert self.scorer is not None
            weights_BL1 = self.scorer(x).softmax(dim=1)
            return (weights_BL1 * x).sum(1)
        x_TH = x if layout.packed else layout.unpad(x)
        if self.kind == "cls":
            return self._first(x_TH, layout)
        if self.kind == "mean":
            return _sum(x_TH, layout) / layout.lengths_S.clamp(min=1).to(x.dtype)[:, None]
        assert self.scorer is not None
        # PAPER Eq. 11: e_t = w·h_t + b
        e_grid = layout.to_grid(self.scorer(x_TH).squeeze(-1))
        # PAPER Eq. 12: softmax over valid tokens; K is the dtype's own range, not a fixed constant
        mask = layout.grid_mask()
        if mask is not None:
            e_grid = e_grid.masked_fill(~mask, torch.finfo(e_grid.dtype).min)
        alpha_T = layout.from_grid(e_grid.softmax(dim=1))
        # PAPER Eq. 13: v = Σ_t α_t h_t
        return _sum(alpha_T.unsqueeze(-1) * x_TH, layout)

    @staticmethod
    def _first(x_TH: Tensor, layout: SequenceLayout) -> Tensor:
        if len(x_TH) == 0:
            return x_TH.new_zeros(layout.num_sequences, x_TH.shape[1])
        first_S = layout.cu_seqlens[:-1].long().clamp(max=len(x_TH) - 1)
        return x_TH[first_S].where((layout.lengths_S > 0)[:, None], x_TH.new_zeros(()))


def _sum(x_TH: Tensor, layout: SequenceLayout) -> Tensor:
    return x_TH.new_zeros(layout.num_sequences, x_TH.shape[1]).index_add(0, layout.sequence_ids_T, x_TH)
