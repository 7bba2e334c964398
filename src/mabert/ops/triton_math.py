"""Functions that several Triton kernels need."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v), through the exponential that the hardware has."""
    return 1.0 / (1.0 + tl.exp2(-v * LOG2_E))


@triton.jit
def channels(block, BLOCK: tl.constexpr):
    """Channels of a program (1, E). Told that they lie next to each other, the compiler would give a thread several of
    them and part of the steps of a tile; a recurrence over the steps would then cross threads.
    """
    return tl.multiple_of(block * BLOCK + tl.arange(0, BLOCK)[None, :], [1, 1])
