"""The T layer: self-attention and a feed-forward network (Eq. 1)."""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mabert.config import MaBertConfig
from mabert.layers.attention import SelfAttention
from mabert.layers.feed_forward import FeedForward
from mabert.ops import SequenceLayout


class TransformerLayer(GradientCheckpointingLayer):
    """Pre-LN residual self-attention and feed-forward network."""

    def __init__(self, config: MaBertConfig):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = SelfAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """(T, H) packed or (B, L, H) padded, to the same shape."""
        # PAPER Eq. 1: X' = X + MHSA(LN(X)), X+ = X' + FFN(LN(X'))
        x = x + self.dropout(self.mixer(self.mixer_norm(x), layout))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))
