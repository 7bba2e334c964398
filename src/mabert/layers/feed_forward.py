"""The position-wise feed-forward network that closes every layer."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


class FeedForward(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        return self.down_proj(self.activation(self.up_proj(x)))
