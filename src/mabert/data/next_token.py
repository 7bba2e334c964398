"""Next-token prediction on packed rows."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from mabert.data.mlm import IGNORED, Key
from mabert.data.rows import Rows


class NextTokenDataset(Dataset[dict[str, torch.Tensor]]):
    """``dataset[(stage, epoch, index)] -> {"input_ids", "seq_idx", "labels"}``, each (length of the stage's rows,).

    Labels are the tokens themselves, which a causal model shifts; −100 at the first token of each sequence of a row,
    which nothing of its own sequence stands before.
    """

    def __init__(self, stages: Sequence[Rows]) -> None:
        self.stages = list(stages)

    def __len__(self) -> int:
        return sum(map(len, self.stages))

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        stage, _, index = key
        ids, seq_idx = self.stages[stage][index]
        begins = np.diff(seq_idx, prepend=-1) != 0
        arrays = {"input_ids": ids, "seq_idx": seq_idx, "labels": np.where(begins, IGNORED, ids)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
