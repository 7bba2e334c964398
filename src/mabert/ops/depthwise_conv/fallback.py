"""The depthwise convolution as W shifted multiply-adds, channels last; runs anywhere, differentiated by autograd.

Shape suffixes: B batch, L length, E inner, W kernel width.
"""

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
    """See `reference.depthwise_conv`."""
    length, width = x_BLE.shape[1], weight_EW.shape[1]
    dtype = torch.promote_types(x_BLE.dtype, torch.float32)
    x_BLE, weight_EW, out_dtype = x_BLE.to(dtype), weight_EW.to(dtype), x_BLE.dtype
    if mask_BL is not None:
        x_BLE = x_BLE.where(mask_BL.unsqueeze(-1), x_BLE.new_zeros(()))
    padded_BLE = F.pad(x_BLE, (0, 0, left, width - 1 - left))
    sequence_L = None if cu_seqlens is None else _sequence_of(cu_seqlens, length, left, width - 1 - left)
    y_BLE = x_BLE.new_zeros(()) if bias_E is None else bias_E.to(dtype)
    y_BLE = y_BLE.expand_as(x_BLE)
    for w in range(width):
        neighbour_BLE = padded_BLE[:, w : w + length]
        if sequence_L is not None and w != left:
            same_L1 = (sequence_L[w : w + length] == sequence_L[left : left + length]).unsqueeze(-1)
            neighbour_BLE = neighbour_BLE.where(same_L1, neighbour_BLE.new_zeros(()))
        y_BLE = torch.addcmul(y_BLE, neighbour_BLE, weight_EW[:, w])
    if silu:
        y_BLE = F.silu(y_BLE)
    if mask_BL is not None:
        y_BLE = y_BLE.where(mask_BL.unsqueeze(-1), y_BLE.new_zeros(()))
    return y_BLE.to(out_dtype)


def _sequence_of(cu_seqlens: Tensor, length: int, left: int, right: int) -> Tensor:
    """Index of the sequence at each of `left + length + right` positions, -1 beyond both ends."""
    ids_S = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    ids_L = ids_S.repeat_interleave(cu_seqlens.diff().long(), output_size=length)
    return F.pad(ids_L, (left, right), value=-1)
