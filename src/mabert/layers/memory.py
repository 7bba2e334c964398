"""What a causal layer remembers of each row of a batch while text is generated.

Shape suffixes: S sequences (rows of the batch), M tokens remembered at most, T new tokens, E features.
"""

from torch import Tensor

from mabert.ops import SequenceLayout


class LayerMemory:
    """Named tensors whose first dimension is the row: states, and grids (S, M, ...) with a place for every token."""

    # what transformers asks of a cache's layers
    is_compileable = is_sliding = is_croppable = is_initialized = supports_early_init = False

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor | None:
        """What is remembered by that name, if anything is."""
        return self.tensors.get(name)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Remember a tensor in the place of an earlier one."""
        self.tensors[name] = tensor

    def drop(self, *names: str) -> None:
        """Forget these."""
        for name in names:
            self.tensors.pop(name, None)

    def write(self, layout: SequenceLayout, **new: Tensor) -> None:
        """Put the new tokens (T, ...) at the places of their indices in grids of those names, which grow as needed."""
        if not layout.num_tokens:
            return
        rows_T, index_T = layout.sequence_ids_T, layout.indices_T
        longest = int(index_T.max()) + 1
        for name, x_T in new.items():
            before = self.tensors.get(name)
            width = longest if before is None else max(longest, before.shape[1])
            grid = x_T.new_zeros(layout.num_sequences, width, *x_T.shape[1:])
            if before is not None:
                grid[:, : before.shape[1]] = before
            grid[rows_T, index_T] = x_T
            self.tensors[name] = grid

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, some perhaps more than once."""
        self.tensors = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
