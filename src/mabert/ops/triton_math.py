"""Functions that several Triton kernels need."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v), through the exponential that the hardware has."""
    return 1.0 / (1.0 + tl.exp2(-v * LOG2_E))
