"""Root-mean-square norm."""

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, in the dtype of its weight: under autocast that is fp32, which torch does for LayerNorm by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        return super().forward(x.to(self.weight.dtype))
