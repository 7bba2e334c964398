"""Runs that are killed, stopped or cut short go on as if nothing had happened.

Every run is a process of its own, forked from one server that has imported everything, and really killed.
"""

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_pretraining import TRANSMAMBA, config, losses

from mabert.training import pretrain as door
from mabert.training.callbacks import read_lines
from mabert.training.checkpoints import AtomicCheckpointTrainer, list_checkpoints
from mabert.training.pretrain import PretrainTrainer, TrainingInterruptedError, pretrain

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mabert.training.pretrain", "tiny_pretraining"])

# The stage changes after step 6. Three micro-batches in a step; checkpoints after steps 2, 4, 6, 8 and 10.
RUN = {"batch_size": 12, "micro_batch_size": 4, "checkpoint_every": 2}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(step):
    """Be killed when the step is done and its checkpoint, if it has one, is not begun."""

    def maybe_log_save_evaluate(trainer, *args, **kwargs):
        if trainer.state.global_step == step:
            die()
        return original(trainer, *args, **kwargs)

    original, PretrainTrainer._maybe_log_save_evaluate = (
        PretrainTrainer._maybe_log_save_evaluate,
        maybe_log_save_evaluate,
    )


def die_within_step(step):
    """Be killed between the second and the third of a step's micro-batches."""
    seen = []

    def training_step(trainer, *args, **kwargs):
        loss = original(trainer, *args, **kwargs)
        seen.append(trainer.state.global_step)
        if seen.count(step - 1) == 2:
            die()
        return loss

    original, PretrainTrainer.training_step = PretrainTrainer.training_step, training_step


def die_while_saving(step):
    """Be killed when a checkpoint's weights and optimizer are written, and the rest is not."""

    def save_rng_state(trainer, folder):
        if trainer.state.global_step == step:
            die()
        return original(trainer, folder)

    original, AtomicCheckpointTrainer._save_rng_state = AtomicCheckpointTrainer._save_rng_state, save_rng_state


def die_while_publishing(_):
    """Be killed when the last checkpoint is written and the final model is not."""
    door.publish = lambda *args: die()


def fail_in_step(step):
    """Raise an error while the loader's workers are at work."""

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step - 1:
            raise ZeroDivisionError
        return original(trainer, *args, **kwargs)

    original, PretrainTrainer.training_step = PretrainTrainer.training_step, training_step


def wait_in_step(step):
    """Say when a step has begun and take a while for it, so that a signal arrives in it."""

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step - 1:
            Path(trainer.args.output_dir, "in-step").touch()
            time.sleep(0.3)
        return original(trainer, *args, **kwargs)

    original, PretrainTrainer.training_step = PretrainTrainer.training_step, training_step


def run(folder, output, changes, fate=None, step=None):
    """What a process of its own does."""
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers; it is inherited otherwise
    gc.freeze()  # what was imported before the fork is not worth the collector's time
    torch.set_num_threads(1)
    if fate is not None:
        fate(step)
    try:
        pretrain(
            config(folder, output=output, **RUN | changes), console=Console(file=(folder / f"{output}.txt").open("w"))
        )
    except TrainingInterruptedError as stopped:
        (folder / f"{output}.stopped").write_text(str(stopped))
        os._exit(128 + stopped.signum)


def end(process):
    """Wait for a process and return its exit code."""
    process.join(timeout=120)
    if process.is_alive():
        process.kill()
        pytest.fail("the run hangs")
    return process.exitcode


def start(folder, output, changes=(), *fate):
    process = SERVER.Process(target=run, args=(folder, output, dict(changes), *fate))
    process.start()
    return process


def finish(folder, output, changes=()):
    """Run to the end and return the raw losses."""
    assert end(start(folder, output, changes)) == 0
    return losses(folder / output)


@pytest.fixture(scope="module")
def uninterrupted(prepared, shards):
    """The raw losses of the whole run."""
    result = finish(prepared, "uninterrupted")
    assert len(result) == 10
    return result


FATES = [
    (die_after_step, 1, 0),
    (die_after_step, 5, 4),
    (die_after_step, 6, 4),
    (die_after_step, 7, 6),
    (die_within_step, 4, 2),
    (die_within_step, 7, 6),
    (die_while_saving, 4, 2),
    (die_while_saving, 6, 4),
]
QUICK = [(*FATES[5], 0), (*FATES[7], 2)]


@pytest.mark.parametrize(
    ("fate", "step", "resumed_at", "workers"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in ((*fate, workers) for fate in FATES for workers in (0, 2))
    ],
)
def test_a_killed_run_goes_on_exactly(prepared, uninterrupted, fate, step, resumed_at, workers):
    output = f"{fate.__name__}-{step}-{workers}"
    assert end(start(prepared, output, {"workers": workers}, fate, step)) == -signal.SIGKILL
    done = step - (fate is die_within_step)
    assert losses(prepared / output) == uninterrupted[:done]
    leftovers = list((prepared / output).glob(".tmp-*"))
    assert bool(leftovers) == (fate is die_while_saving)
    assert [path.name for path in list_checkpoints(prepared / output)][-1:] == [f"checkpoint-{resumed_at}"] * bool(
        resumed_at
    )

    assert finish(prepared, output, {"workers": workers}) == uninterrupted
    assert [line["step"] for line in read_lines(prepared / output / "log.jsonl")] == list(range(1, 11))
    said = (prepared / f"{output}.txt").read_text()
    assert (f"going on from {prepared / output / f'checkpoint-{resumed_at}'}" in said) == bool(resumed_at)
    assert not list((prepared / output).glob(".tmp-*"))


def test_a_killed_run_of_a_causal_model_goes_on_exactly(prepared, shards):
    changes = {"model": TRANSMAMBA}
    whole = finish(prepared, "causal-whole", changes)
    assert end(start(prepared, "causal-killed", changes, die_within_step, 7)) == -signal.SIGKILL
    assert finish(prepared, "causal-killed", changes) == whole


@pytest.mark.parametrize(
    ("signum", "workers"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_exactly(prepared, uninterrupted, signum, workers):
    output = f"stopped-by-{signum}-{workers}"
    process = start(prepared, output, {"workers": workers}, wait_in_step, 5)
    while not (prepared / output / "in-step").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signum)
    assert end(process) == 128 + signum
    assert losses(prepared / output) == uninterrupted[:5]  # the running step was finished
    assert list_checkpoints(prepared / output)[-1].name == "checkpoint-5"
    message = (prepared / f"{output}.stopped").read_text()
    assert f"Stopped by {signum.name} after step 5" in message
    assert finish(prepared, output) == uninterrupted


def test_a_damaged_checkpoint_is_skipped_aloud(prepared, uninterrupted):
    output = "damaged"
    end(start(prepared, output, {}, die_after_step, 9))
    weights = prepared / output / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert finish(prepared, output) == uninterrupted
    said = (prepared / f"{output}.txt").read_text()
    assert "checkpoint-8 skipped: model.safetensors has" in said
    assert f"going on from {prepared / output / 'checkpoint-6'}" in said


def test_a_run_killed_after_its_last_step_is_only_finished(prepared, uninterrupted):
    output = "last"
    end(start(prepared, output, {}, die_while_publishing, None))
    assert not (prepared / output / "config.json").exists()
    assert finish(prepared, output) == uninterrupted
    assert (prepared / output / "metrics.json").exists()


def test_an_error_ends_the_workers_too(prepared, shards):
    assert end(start(prepared, "failed", {"workers": 2}, fail_in_step, 3)) == 1
