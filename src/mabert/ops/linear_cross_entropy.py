"""The loss of a large vocabulary without its logits: a few tokens at a time, with the gradients made on the way.

Shape suffixes: T tokens, H hidden, V vocabulary, C tokens in a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""So many logits are held at a time, at most, by the kind of device: on a CPU as many as stay in its caches."""
LEAST_TOKENS = 256
"""At least so many tokens' at a time: for each piece the whole gradient of the weight is added up once."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the tokens of the cross-entropy of softmax(x weightᵀ), in at least fp32.

    Products run in autocast's dtype where there is one. No more than `LOGITS_AT_ONCE` logits or gradients of logits are
    ever held; the gradients of x and weight are computed with the loss, and only scaled in the backward pass.

    Args:
        x: (T, H) floating point; weight: (V, H); targets: (T,) int64 in 0 to V - 1.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy takes x (T, H), weight (V, H) and targets (T,), not "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}."
        )
    wants = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, targets, wants)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, wants_gradients: bool) -> Tensor:
        """The loss, and what the backward pass scales."""
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        device = x_TH.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TH.dtype
        loss = x_TH.new_zeros((), dtype=dtype)
        dx_TH = torch.empty_like(x_TH) if wants_gradients else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=dtype) if wants_gradients else None
        chunk = max(LEAST_TOKENS, LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE["cuda"]) // weight_VH.shape[0])
        with torch.autocast(device, enabled=False):
            weight = weight_VH.to(compute)
            for start in range(0, len(x_TH), chunk):
                x_CH, targets_C = x_TH[start : start + chunk].to(compute), targets_T[start : start + chunk]
                logits_CV = F.linear(x_CH, weight).to(dtype)
                log_sums_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
                loss += (log_sums_C1.squeeze(1) - logits_CV.gather(1, targets_C[:, None]).squeeze(1)).sum()
                if dx_TH is None or dweight_VH is None:
                    continue
                dlogits_CV = logits_CV.sub_(log_sums_C1).exp_()
                dlogits_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
                dlogits = dlogits_CV.to(compute)
                dx_TH[start : start + chunk] = dlogits @ weight
                if compute == dtype:
                    dweight_VH.addmm_(dlogits.T, x_CH)
                else:
                    dweight_VH += dlogits.T @ x_CH
        ctx.save_for_backward(dx_TH, None if dweight_VH is None else dweight_VH.to(weight_VH.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale."""
        dx_TH, dweight_VH = ctx.saved_tensors
        return dx_TH * dloss.to(dx_TH.dtype), dweight_VH * dloss.to(dweight_VH.dtype), None, None
