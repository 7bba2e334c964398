"""Masked language modelling: BERT's 80/10/10, with randomness that depends on the sample's place alone.

`MlmDataset` masks packed rows for `mabert.training`; `MlmCollator` masks tokenised examples for a Trainer of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from mabert.data.rows import Rows

Key = tuple[int, int, int]
"""(stage, epoch, index of the row in its stage)"""

IGNORED = -100
_ORDER, _MASKS, _COLLATOR = 0, 1, 2  # what randomness is drawn for


def mask_tokens(
    ids: np.ndarray,
    maskable: np.ndarray,
    *,
    mask_token_id: int,
    replacements: np.ndarray,
    mlm_probability: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Select each ``maskable`` token with ``mlm_probability``; return (input_ids, labels), both like ``ids``.

    Of the selected tokens 80 % become the mask, 10 % one of ``replacements`` (ids, (n,)), 10 % stay. labels hold the
    ids of the selected tokens and −100 elsewhere; there may be none.
    """
    # PAPER: 80/10/10 replacement
    # CHOICE: every token is drawn by itself, as transformers' collator does, so rows differ in their number of labels
    draw = rng.random(ids.shape) / mlm_probability  # uniform on [0, 1) where it selects
    selected = maskable & (draw < 1)
    labels = np.where(selected, ids, IGNORED)
    input_ids = np.where(selected & (draw < 0.8), mask_token_id, ids)
    replaced = selected & (draw >= 0.8) & (draw < 0.9)
    input_ids[replaced] = rng.choice(replacements, size=np.count_nonzero(replaced))
    return input_ids, labels


def permuted_index(seed: int, stage: int, epoch: int, n: int) -> np.ndarray:
    """Return the order in which one epoch of a stage visits its n rows: a permutation, (n,) int64."""
    return _generator(seed, _ORDER, stage, epoch).permutation(n)


class MlmDataset(Dataset[dict[str, torch.Tensor]]):
    """``dataset[(stage, epoch, index)] -> {"input_ids", "seq_idx", "labels"}``, each (length of the stage's rows,).

    What is masked in a row is a function of (seed, stage, epoch, index) alone: the same in any process, in any order.
    Special tokens are never selected nor put in.
    """

    def __init__(
        self,
        stages: Sequence[Rows],
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
        mlm_probability: float = 0.15,
    ) -> None:
        self.stages, self.seed = list(stages), seed
        self._masking = _Masking(tokenizer, mlm_probability)

    def __len__(self) -> int:
        return sum(map(len, self.stages))

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        stage, epoch, index = key
        ids, seq_idx = self.stages[stage][index]
        input_ids, labels = self._masking(ids, _generator(self.seed, _MASKS, stage, epoch, index))
        arrays = {"input_ids": input_ids, "seq_idx": seq_idx, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate_rows(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples of equal length: every entry becomes (B, L)."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class MlmCollator:
    """Pad tokenised examples, mask them and add "labels": for plain `datasets` and Trainer.

    Examples hold ``input_ids`` and what else the tokenizer gave; ``attention_mask`` is in the batch, pads and special
    tokens are never selected. In the main process the masks follow from ``seed`` and the number of batches made so
    far; in a data loader's worker from ``seed`` and the worker's own seed, so `torch.manual_seed` repeats them.

    Example::

        tokenizer = AutoTokenizer.from_pretrained("runs/tiny")
        model = AutoModelForMaskedLM.from_pretrained("runs/tiny")
        lines = load_dataset("text", data_files="text.txt", split="train")
        examples = lines.map(lambda line: tokenizer(line["text"], truncation=True), remove_columns="text")
        Trainer(model, TrainingArguments("out"), MlmCollator(tokenizer), examples).train()
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mlm_probability: float = 0.15, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self._masking = _Masking(tokenizer, mlm_probability)
        self._batches = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch of (B, longest example) tensors."""
        kept = [
            {name: value for name, value in example.items() if name != "special_tokens_mask"} for example in examples
        ]
        batch = self.tokenizer.pad(kept, return_tensors="pt")
        worker = get_worker_info()
        generator = _generator(self.seed, _COLLATOR, worker.seed if worker else 0, self._batches)
        self._batches += 1
        real = batch["attention_mask"].numpy().astype(bool)
        input_ids, labels = self._masking(batch["input_ids"].numpy(), generator, real)
        return {**batch, "input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


class _Masking:
    """`mask_tokens` with one tokenizer's mask, special and ordinary tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mlm_probability: float) -> None:
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability={mlm_probability} must be over 0 and at most 1")
        self._is_ordinary = np.ones(len(tokenizer), bool)
        self._is_ordinary[tokenizer.all_special_ids] = False
        self._settings: dict[str, Any] = {
            "mask_token_id": tokenizer.mask_token_id,
            "replacements": np.flatnonzero(self._is_ordinary),
            "mlm_probability": mlm_probability,
        }

    def __call__(
        self, ids: np.ndarray, rng: np.random.Generator, real: np.ndarray | bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        return mask_tokens(ids, self._is_ordinary[ids] & real, rng=rng, **self._settings)


def _generator(seed: int, purpose: int, *place: int) -> np.random.Generator:
    """Return the random numbers of one place: the key and counter of Philox give each its own stream, without a state.

    The first of the four counter words counts within the stream.
    """
    counter = np.array([0, *place, 0, 0][:4], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter))
