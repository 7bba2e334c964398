"""The depthwise convolution, one output at a time: the specification that every backend is tested against.

Shape suffixes: B batch, L length, E inner, W kernel width.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def depthwise_conv(
    x_BLE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor | None,
    mask_BL: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    silu: bool,
) -> Tensor:
    """y[t] = Σ_w weight[w] · x[t + w - left] + bias over the neighbours that exist; differentiable by autograd."""
    batch, length, _ = x_BLE.shape
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            depthwise_conv(
                x_BLE[:, start:end],
                weight_EW,
                bias_E,
                None if mask_BL is None else mask_BL[:, start:end],
                None,
                left,
                silu,
            )
            for start, end in pairwise(bounds)
        ]
        return torch.cat(parts, dim=1)
    dtype = torch.promote_types(x_BLE.dtype, torch.float32)
    x, weight = x_BLE.to(dtype), weight_EW.to(dtype)
    if mask_BL is not None:
        x = x.where(mask_BL.unsqueeze(-1), x.new_zeros(()))
    zero_BE = x.new_zeros(batch, x.shape[2])
    outputs = []
    for t in range(length):
        y_BE = zero_BE if bias_E is None else zero_BE + bias_E.to(dtype)
        for w in range(weight.shape[1]):
            if 0 <= t + w - left < length:
                y_BE = y_BE + weight[:, w] * x[:, t + w - left]
        outputs.append(y_BE)
    y_BLE = torch.stack(outputs, dim=1) if outputs else x
    if silu:
        y_BLE = F.silu(y_BLE)
    if mask_BL is not None:
        y_BLE = y_BLE.where(mask_BL.unsqueeze(-1), y_BLE.new_zeros(()))
    return y_BLE.to(x_BLE.dtype)
