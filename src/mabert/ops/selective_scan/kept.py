"""How many states the scan's forward keeps for its backward."""

KEPT_EVERY = 32


def kept_rows(batch_size: int, length: int, sequences: int | None) -> int:
    """Upper bound of the number of (E, N) states kept: one every KEPT_EVERY steps of each sequence."""
    if sequences is None:
        return batch_size * -(-length // KEPT_EVERY)
    return length // KEPT_EVERY + sequences
