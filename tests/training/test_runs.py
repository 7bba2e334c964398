import signal
import subprocess
import sys
import timeit

import pytest
import tiny_finetuning
import torch
from rich.console import Console
from tiny_pretraining import config
from transformers import AutoModelForMaskedLM

from mabert.training import runs
from mabert.training.checkpoints import list_checkpoints
from mabert.training.finetune import finetune
from mabert.training.pretrain import PretrainTrainer, pretrain


def test_a_checkpoint_never_holds_weights_that_are_no_numbers(prepared, shards, monkeypatch):
    """The gradient of step 3 overflows, its loss does not: the run ends, and goes on from checkpoint-2."""
    original = PretrainTrainer.training_step

    def overflow(trainer, *args, **kwargs):
        loss = original(trainer, *args, **kwargs)
        if trainer.state.global_step == 2:
            trainer.model.mabert.norm.weight.grad.fill_(float("inf"))
        return loss

    choices = config(prepared, output="overflow", steps=4, checkpoint_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(PretrainTrainer, "training_step", overflow)
        with pytest.raises(FloatingPointError, match=r"NaN or infinite by step 3\. Lower learning_rate"):
            pretrain(choices, console=Console(quiet=True))
    assert [path.name for path in list_checkpoints(choices.output)] == ["checkpoint-1", "checkpoint-2"]
    assert pretrain(choices, console=Console(quiet=True)).steps == 4
    model = AutoModelForMaskedLM.from_pretrained(choices.output)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


HOLD = """
import sys, time
from pathlib import Path
from mabert.training.runs import _locked
with _locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def pretrain_in(prepared, output):
    return config(prepared, output=str(output), steps=2), pretrain


def finetune_in(prepared, output):
    return tiny_finetuning.config(tiny_finetuning.prepare(output.parent), output), finetune


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.parametrize("kind", [pretrain_in, finetune_in])
def test_one_run_at_a_time_trains_in_a_folder(prepared, shards, tmp_path, kind):
    choices, train = kind(prepared, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BlockingIOError, match=rf"another process \(pid {other.pid}\) is training in .*run: wait"):
            train(choices, console=Console(quiet=True))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        other.send_signal(signal.SIGKILL)
    assert train(choices, console=Console(quiet=True)).steps > 0


@pytest.mark.parametrize(("imitates", "bf16"), [(True, True), (True, False), (False, True)])
def test_bf16_on_a_processor_without_it_is_warned_of(prepared, monkeypatch, caplog, imitates, bf16):
    monkeypatch.setattr(runs, "imitates_bf16", lambda: imitates)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    runs.training_arguments(config(prepared, bf16=bf16), steps=1, micro_batch_size=1, accumulation=1)
    assert ("bf16=false is faster here" in caplog.text) == (imitates and bf16)


def test_where_bf16_is_imitated_its_products_take_longer():
    """What the warning says, measured where it would be given."""
    if not runs.imitates_bf16():
        pytest.skip("this processor has bf16, or nothing is known of it")

    def seconds(dtype):
        a, b = torch.randn(512, 512).to(dtype), torch.randn(512, 512).to(dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=5))

    assert seconds(torch.bfloat16) > 2 * seconds(torch.float32)
