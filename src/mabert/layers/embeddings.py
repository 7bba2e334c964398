"""Token, position and segment embeddings.

Shape suffixes: B batch, L length, T real tokens in all, H hidden.
"""

import torch
from torch import Tensor, nn

from mabert.config import MaBertConfig
from mabert.layers.padding import PSM, zero_pads
from mabert.ops import SequenceLayout


class Embeddings(nn.Module):
    """Sum of token, position and segment embeddings, then LayerNorm and dropout."""

    def __init__(self, config: MaBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding_type == "absolute"
            else None
        )
        # CHOICE: an embedding LayerNorm and dropout, as in BERT
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.psm = PSM[config.psm]

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        layout: SequenceLayout,
    ) -> Tensor:
        """(B, L) ids or (B, L, H) embeddings to tokens in the layout's execution: (T, H) or (B, L, H)."""
        x = self._select(inputs_embeds, layout) if input_ids is None else self._words(input_ids, layout)
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(self._select(token_type_ids, layout))
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(layout.positions)
        if self.psm.embeddings:
            x = zero_pads(x, layout)
        x = self.dropout(self.norm(x))
        return zero_pads(x, layout) if self.psm.embeddings else x

    def _words(self, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
        return self.word_embeddings(self._select(input_ids, layout))

    @staticmethod
    def _select(tensor: Tensor | None, layout: SequenceLayout) -> Tensor:
        assert tensor is not None
        return layout.unpad(tensor) if layout.packed else tensor

    @torch.no_grad()
    def resize_positions(self, positions: int) -> None:
        """Stretch the learned position table to `positions` entries by linear interpolation."""
        if self.position_embeddings is None:
            return
        # CHOICE: the whole table is stretched, both ends kept, rather than extended beyond its end
        old_PH = self.position_embeddings.weight
        new_PH = nn.functional.interpolate(old_PH.T[None].float(), size=positions, mode="linear", align_corners=True)[
            0
        ].T
        table = nn.Embedding(positions, old_PH.shape[1], device=old_PH.device, dtype=old_PH.dtype)
        table.weight.copy_(new_PH)
        table.weight.requires_grad_(old_PH.requires_grad)
        self.position_embeddings = table
