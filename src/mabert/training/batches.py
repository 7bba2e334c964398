"""Which rows each optimizer step sees, in which process, as a pure function of the seed and the step."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from mabert.data.mlm import Key, collate_rows, permuted_index
from mabert.training.optim import Schedule


@dataclass(frozen=True)
class WorldLayout:
    """How one batch is divided among processes and forward passes.

    Raises:
        ValueError: the batch cannot be divided into equal micro-batches.
    """

    batch_size: int
    """Sequences in one optimizer step, over all processes."""
    micro_batch_size: int
    """Sequences in one forward pass of one process."""
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        in_flight = self.micro_batch_size * self.world_size
        if self.batch_size % in_flight:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size} times "
                f"{self.world_size} process{'es' * (self.world_size > 1)}. Choose micro_batch_size so that "
                f"micro_batch_size x processes divides {self.batch_size}."
            )

    @property
    def accumulation(self) -> int:
        """Forward passes of each process in one optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)


class StagedBatchSampler(Sampler[list[Key]]):
    """Yields this process's micro-batches, `layout.accumulation` for each optimizer step, from `first_step` on.

    Step s of a stage takes the next `batch_size` rows of the stage's shuffled epochs. Micro-batch j of the batch goes
    to process j mod W, so W processes see the batch of one process with W times the accumulation. A stage changes
    between two optimizer steps, never within one.

    It has no length on purpose: the Trainer would take it for the length of an epoch.
    """

    def __init__(
        self, schedule: Schedule, rows: Sequence[int], layout: WorldLayout, *, seed: int, first_step: int = 0
    ) -> None:
        for stage, (count, steps) in enumerate(zip(rows, schedule.stage_steps, strict=True)):
            if steps and not count:
                raise ValueError(f"stage {stage} has {steps} steps but not one row of text to train on.")
        self.schedule, self.rows, self.layout = schedule, rows, layout
        self.seed, self.first_step = seed, first_step
        # A batch reaches over two epochs at most, unless there are fewer rows than sequences in it.
        self._order = lru_cache(maxsize=2)(permuted_index)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first_step, self.schedule.steps):
            yield from self.micro_batches(step)

    def micro_batches(self, step: int) -> list[list[Key]]:
        """This process's share of the batch of `step`."""
        stage = self.schedule.stage_at(step)
        stage_begin = (0, *self.schedule.stage_ends)[stage]
        batch_begin = (step - stage_begin) * self.layout.batch_size
        size, stride = self.layout.micro_batch_size, self.layout.micro_batch_size * self.layout.world_size
        first = batch_begin + self.layout.rank * size
        return [
            [self._key(stage, position) for position in range(begin, begin + size)]
            for begin in range(first, batch_begin + self.layout.batch_size, stride)
        ]

    def _key(self, stage: int, position: int) -> Key:
        epoch, place = divmod(position, self.rows[stage])
        return stage, epoch, int(self._order(self.seed, stage, epoch, self.rows[stage])[place])


def train_loader(
    dataset: Any,
    sampler: StagedBatchSampler,
    *,
    workers: int,
    pin_memory: bool,
    collate: Callable[[list[Any]], Any] = collate_rows,
) -> DataLoader:
    """Load the sampler's micro-batches, ahead of time where there are workers, without touching the global RNG."""
    return _Loader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        # The next optimizer step's micro-batches are ready when it begins.
        prefetch_factor=max(2, math.ceil(sampler.layout.accumulation / workers)) if workers else None,
        worker_init_fn=partial(_obey_only, os.getpid()),
        # A loader without a generator draws its workers' seed from the global one, and dropout with it would change.
        generator=torch.Generator().manual_seed(sampler.seed),
    )


class _Loader(DataLoader):
    """A DataLoader whose workers are born deaf to SIGTERM.

    torch may start threads in a worker before its first line of ours runs, and a signal would reach those.
    """

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_only(parent: int, worker: int) -> None:
    """Let Ctrl-C and SIGTERM end this worker only if `parent` sends them.

    From a terminal or a scheduler they reach every process of a run, and the workers must outlive the step in progress.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows cannot tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
