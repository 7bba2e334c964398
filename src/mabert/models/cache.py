"""What a causal model remembers while it generates, as transformers' `generate` wants it."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mabert.layers.memory import LayerMemory
from mabert.ops import SequenceLayout


class CausalCache(Cache):
    """The memory of each layer, and how far each row has come.

    Rows may be of any length, with pads anywhere: none of them is remembered.
    """

    def __init__(self, num_layers: int):
        self.memories = [LayerMemory() for _ in range(num_layers)]
        super().__init__(layers=self.memories)  # type: ignore[arg-type]
        self.columns = 0
        self.lengths_S: Tensor | None = None
        self.transpoints: list[int] | None = None

    def bind(self, transpoints: list[int]) -> None:
        """Remember the TransPoints of a TransMamba that is about to read.

        Raises:
            ValueError: they are others than those that the cache began with.
        """
        if self.transpoints not in (None, transpoints):
            raise ValueError(
                f"transpoints were {self.transpoints} when this cache began and are {transpoints} now: what it holds "
                "of the tokens so far is not what they need. Begin with a new cache."
            )
        self.transpoints = transpoints

    def advance(self, layout: SequenceLayout) -> None:
        """Count the tokens of a batch that the layers have seen."""
        self.columns += layout.length
        lengths_S = layout.lengths_S
        self.lengths_S = lengths_S if self.lengths_S is None else self.lengths_S + lengths_S

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far, pads included: what `generate` cuts from its input."""
        return self.columns

    def get_max_length(self, *args: Any) -> int:
        """No limit."""
        return -1

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, some perhaps more than once."""
        for memory in self.memories:
            memory.select(rows)
        if self.lengths_S is not None:
            self.lengths_S = self.lengths_S.index_select(0, rows.to(self.lengths_S.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the beams of these rows."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows."""
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each row so many times."""
        if self.lengths_S is not None:
            self.select(torch.arange(len(self.lengths_S)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.columns, self.lengths_S, self.transpoints = 0, None, None
        for memory in self.memories:
            memory.tensors.clear()

    def crop(self, *args: Any) -> None:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError("A recurrent state cannot be taken back by some tokens: begin with a new cache.")

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(memory.nbytes for memory in self.memories)
