"""Two processes under torchrun (gloo) do what one does, and stop, save and go on together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_pretraining
import torch
from rich.console import Console
from tiny_pretraining import MODEL, TRANSMAMBA, config, losses

from mabert.training.callbacks import read_lines
from mabert.training.checkpoints import list_checkpoints
from mabert.training.pretrain import pretrain

pytestmark = pytest.mark.slow

CHANGES = {
    "model": MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "steps": 12,
    "stage_fractions": (0.5, 0.5),
    "micro_batch_size": 2,
    "eval_every": 3,
    "checkpoint_every": 5,
}
SCRIPT = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(tiny_pretraining.__file__).parent)!r})
from tiny_pretraining import config
from mabert.training.pretrain import TrainingInterruptedError, pretrain
try:
    pretrain(config(Path(sys.argv[1]), output=sys.argv[2], **json.loads(sys.argv[3])))
except TrainingInterruptedError as stopped:
    print(stopped)
"""


def torchrun(folder, output, **changes):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    return subprocess.Popen(
        [*launcher, str(folder), output, json.dumps(CHANGES | changes)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def alone(prepared, shards):
    """The output of one process, with twice the accumulation."""
    choices = config(prepared, output="alone", **CHANGES)
    pretrain(choices, console=Console(quiet=True))
    return choices.output


def test_two_processes_see_the_batches_of_one(prepared, alone):
    said = finish(torchrun(prepared, "two", workers=1))
    assert losses(prepared / "two") == pytest.approx(losses(alone), rel=1e-4)
    assert said.count("held-out at step 12, 16 tokens") == 1  # the second process is silent
    assert "destroy_process_group" not in said
    for one, two in zip(*(read_lines(path / "evaluations.jsonl") for path in (alone, prepared / "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert json.loads((prepared / "two" / "metrics.json").read_text())["environment"]["processes"] == "2"
    dropout = [
        torch.load(prepared / "two" / "checkpoint-12" / f"rng_state_{rank}.pth", weights_only=False)["cpu"]
        for rank in (0, 1)
    ]
    assert not torch.equal(*dropout)  # the processes do not drop the same units of different rows


def test_two_processes_build_the_shards_once(prepared, alone):
    finish(torchrun(prepared, "fresh", shards=str(prepared / "fresh-shards")))
    assert losses(prepared / "fresh") == pytest.approx(losses(alone), rel=1e-4)


def test_two_processes_stop_at_the_same_step_and_go_on_exactly(prepared):
    dropout = {"model": MODEL, "steps": 150, "eval_every": 1000}
    finish(torchrun(prepared, "whole", **dropout))
    process = torchrun(prepared, "stopped", **dropout)
    log = prepared / "stopped" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 20):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert said.count("Stopped by SIGTERM after step") == 2
    done = len(losses(prepared / "stopped"))
    assert 20 < done < 150
    assert list_checkpoints(prepared / "stopped")[-1].name == f"checkpoint-{done}"
    finish(torchrun(prepared, "stopped", **dropout))
    assert losses(prepared / "stopped") == losses(prepared / "whole")


def test_a_causal_model_sees_the_batches_of_one_process(prepared, shards):
    """Also where a layer attends to whole rows, and what only its SSM reads has no gradient."""
    model = TRANSMAMBA | {"transpoints": [0, 32]}
    choices = config(prepared, output="causal-alone", **CHANGES | {"model": model})
    pretrain(choices, console=Console(quiet=True))
    finish(torchrun(prepared, "causal-two", model=model))
    assert losses(prepared / "causal-two") == pytest.approx(losses(choices.output), rel=1e-4)
