import pytest
import torch
from rich.console import Console
from tiny_pretraining import config
from transformers import AutoModelForMaskedLM

from mabert.training.checkpoints import list_checkpoints
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
