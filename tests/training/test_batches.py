import itertools
import signal
import subprocess

import pytest
import torch
from tiny_pretraining import LENGTHS

from mabert.data.mlm import MlmDataset
from mabert.data.rows import Rows
from mabert.data.tokenizer import load_tokenizer
from mabert.training import batches as training_batches
from mabert.training.batches import StagedBatchSampler, WorldLayout, train_loader
from mabert.training.optim import plan_schedule

SCHEDULE = plan_schedule(10, stage_fractions=(0.6, 0.4))
ROWS = (20, 7)
ALONE = WorldLayout(8, 2)


def sampler(layout=ALONE, *, rows=ROWS, seed=3, first_step=0):
    return StagedBatchSampler(SCHEDULE, rows, layout, seed=seed, first_step=first_step)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 1), (2, 2), (4, 2), (2, 4), (4, 1)])
def test_processes_share_the_batch_of_one_process(world_size, micro_batch_size):
    alone = sampler(WorldLayout(8, micro_batch_size))
    ranks = [sampler(WorldLayout(8, micro_batch_size, world_size, rank)) for rank in range(world_size)]
    for step in range(SCHEDULE.steps):
        parts = [rank.micro_batches(step) for rank in ranks]
        assert all(len(part) == ranks[0].layout.accumulation for part in parts)
        together = [micro_batch for round_ in zip(*parts, strict=True) for micro_batch in round_]
        assert together == alone.micro_batches(step)


@pytest.mark.parametrize("first_step", [0, 1, 5, 6, 9])
def test_it_begins_at_any_step_as_if_it_had_run_there(first_step):
    assert list(sampler(first_step=first_step)) == list(sampler())[first_step * ALONE.accumulation :]


def test_every_epoch_visits_every_row_once_in_a_new_order():
    keys = list(itertools.chain(*sampler()))
    for stage, count in enumerate(ROWS):
        positions = [key for key in keys if key[0] == stage]
        epochs = [list(itertools.islice(positions, begin, begin + count)) for begin in range(0, len(positions), count)]
        for epoch, seen in enumerate(epochs):
            assert {key[1] for key in seen} == {epoch}
            if len(seen) == count:
                assert sorted(index for _, _, index in seen) == list(range(count))
        orders = [[index for _, _, index in seen] for seen in epochs if len(seen) == count]
        assert len(orders) > 1
        assert all(one != other for one, other in itertools.pairwise(orders))


def test_the_stage_changes_between_two_steps():
    stages = [{key[0] for micro_batch in sampler().micro_batches(step) for key in micro_batch} for step in range(10)]
    assert stages == [{0}] * 6 + [{1}] * 4


def test_the_seed_decides_the_order():
    assert list(sampler(seed=3)) == list(sampler(seed=3))
    assert list(sampler(seed=3)) != list(sampler(seed=4))


def test_fewer_rows_than_sequences_in_a_batch():
    batch = list(itertools.chain(*sampler(rows=(3, 7)).micro_batches(0)))
    assert [epoch for _, epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="batch_size=8 is not a multiple of micro_batch_size=3 times 1 process\\."):
        WorldLayout(8, 3)
    with pytest.raises(ValueError, match="micro_batch_size=4 times 4 processes"):
        WorldLayout(8, 4, world_size=4)


def test_a_stage_without_text_is_refused():
    with pytest.raises(ValueError, match="stage 1 has 4 steps but not one row"):
        sampler(rows=(20, 0))


# Python 3.12 and newer warn of every fork in a process with threads, as torch's are; the workers use none of them.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def dataset(prepared, shards):
    return MlmDataset([Rows(shards, n) for n in LENGTHS], load_tokenizer(prepared / "tokenizer"), seed=0)


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_numbers_alone(dataset, workers):
    rows = [len(stage) for stage in dataset.stages]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = list(train_loader(dataset, sampler(rows=rows, first_step=5), workers=workers, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16)] * 4 + [(2, 32)] * 16
    expected = [dataset[key] for key in next(iter(sampler(rows=rows, first_step=5)))]
    assert torch.equal(batches[0]["labels"], torch.stack([sample["labels"] for sample in expected]))


@FORKS
@pytest.mark.parametrize("threads", [1, 2])
def test_workers_outlive_signals_to_the_process_group(dataset, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = [len(stage) for stage in dataset.stages]
    batches = iter(train_loader(dataset, sampler(rows=rows), workers=2, pin_memory=False))
    for _ in range(2):  # they take turns: now both of them are past their start
        next(batches)
    pids = [str(worker.pid) for worker in batches._workers]
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, *pids], check=True)
    torch.set_num_threads(before)
    assert sum(1 for _ in batches) == 38


@FORKS
def test_workers_are_born_deaf_to_a_signal(dataset, tmp_path, monkeypatch):
    """torch may have started threads in a worker by then, which a later mask would not reach."""

    def first_line_of_ours(parent, worker):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set())
        (tmp_path / str(worker)).write_text(" ".join(signum.name for signum in blocked))

    monkeypatch.setattr(training_batches, "_obey_only", first_line_of_ours)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    rows = [len(stage) for stage in dataset.stages]
    next(iter(train_loader(dataset, sampler(rows=rows), workers=1, pin_memory=False)))
    assert (tmp_path / "0").read_text() == "SIGTERM"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before


@FORKS
def test_workers_end_when_their_parent_says_so(dataset):
    rows = [len(stage) for stage in dataset.stages]
    batches = iter(train_loader(dataset, sampler(rows=rows), workers=1, pin_memory=False))
    next(batches)
    (worker,) = batches._workers
    worker.terminate()  # what the interpreter does at its exit, before it waits for them
    worker.join(timeout=10)
    assert worker.exitcode == 0
