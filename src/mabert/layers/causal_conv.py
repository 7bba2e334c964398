"""The causal depthwise convolution before an SSM, over new tokens and what is remembered of earlier ones.

Shape suffixes: T new tokens, S sequences, Q new tokens of the longest one, W kernel width, E features.
"""

import torch
from torch import Tensor, nn

from mabert.layers.memory import LayerMemory
from mabert.ops import SequenceLayout, depthwise_conv


class CausalConv(nn.Module):
    """SiLU of a causal convolution of each feature by itself."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.conv1d = nn.Conv1d(features, features, width, groups=features)

    def forward(self, x_TE: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, E) to (T, E). Remembers the last W - 1 inputs of each sequence as `conv` (S, W - 1, E)."""
        if memory is None:
            return self._convolve(x_TE[None], layout.cu_seqlens)[0]
        kept = self.conv1d.kernel_size[0] - 1
        before = memory.get("conv")
        if before is None:
            before = x_TE.new_zeros(layout.num_sequences, kept, x_TE.shape[-1])
        x_SQE = torch.cat((before, layout.to_grid(x_TE)), dim=1)
        places = layout.lengths_S[:, None] + torch.arange(kept, device=x_TE.device)
        memory.keep("conv", x_SQE.take_along_dim(places.unsqueeze(-1), dim=1))
        return layout.from_grid(self._convolve(x_SQE, None)[:, kept:])

    def _convolve(self, x_BLE: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        return depthwise_conv(x_BLE, weight, bias, mode="causal", activation="silu", cu_seqlens=cu_seqlens)
