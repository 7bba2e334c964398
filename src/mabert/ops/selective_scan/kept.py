"""How many states the scan's forward keeps for its backward."""

from mabert.ops.gpu import INTERPRETED

# Steps between two of them.
KEPT_EVERY = 32
# In Triton; its interpreter is slow, and a test's few tokens must be more than one tile there.
TRITON_KEPT_EVERY = 4 if INTERPRETED else 16


def kept_rows(backend: str, batch_size: int, length: int, sequences: int | None) -> int:
    """Upper bound of the number of (E, N) states kept: one every few steps of each sequence.

    The Triton kernel counts the steps of a whole row, packed or not.
    """
    if backend == "triton":
        return batch_size * -(-length // TRITON_KEPT_EVERY)
    if sequences is None:
        return batch_size * -(-length // KEPT_EVERY)
    return length // KEPT_EVERY + sequences
