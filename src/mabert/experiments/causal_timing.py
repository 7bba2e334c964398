"""Time of a causal model's training step, or of one TransMamba mixer, measured in the process that runs this module:

    python -m mabert.experiments.causal_timing '{"architecture": "TransMamba-V9", ...}'

The argument is a `CausalTiming` as JSON; the last line printed is the result.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from mabert.causal_config import TransMambaConfig
from mabert.experiments.causal_architectures import causal_architecture
from mabert.experiments.scales import CausalScale
from mabert.experiments.timing import memory, milliseconds, print_result, repeat
from mabert.ops import SequenceLayout
from mabert.training.optim import adamw


@dataclass(frozen=True, kw_only=True)
class CausalTiming:
    """What is measured, and how, as JSON values."""

    architecture: str
    size: dict[str, Any]
    """Fields of a `CausalScale` that say how large the model is."""
    length: int
    point: int | None = None
    """Only one mixer of TransMamba, forward and backward, with this TransPoint; otherwise a model's training step."""
    bf16: bool
    device: str
    threads: int | None = None
    """Of a CPU; torch's own number by default."""
    warm_up: int = 1
    repetitions: int
    seconds: float


def measure(timing: CausalTiming) -> dict[str, Any]:
    """Median and samples in milliseconds of one row, and the most memory used."""
    torch.manual_seed(0)
    config = causal_architecture(timing.architecture, CausalScale(**timing.size), longest=timing.length)
    make = training_step if timing.point is None else mixer_pass
    run, parameters = make(config, timing)
    with memory(timing.device) as used:
        samples = repeat(run, milliseconds(run, timing.device), timing)
    return samples | used | {"parameters": parameters, "threads": torch.get_num_threads()}


def precision(timing: CausalTiming) -> torch.autocast:
    """That of a forward pass."""
    return torch.autocast(timing.device, torch.bfloat16, enabled=timing.bf16)


def training_step(config: Any, timing: CausalTiming) -> tuple[Callable[[], None], int]:
    """One step of the optimizer over one row, every token of which is predicted."""
    model = AutoModelForCausalLM.from_config(config).to(timing.device).train()
    optimizer = adamw(model, learning_rate=1e-4)
    ids = torch.randint(5, config.vocab_size, (1, timing.length), device=timing.device)

    def run() -> None:
        with precision(timing):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run, model.num_parameters()


def mixer_pass(config: Any, timing: CausalTiming) -> tuple[Callable[[], None], int]:
    """One mixer by itself, forward and backward."""
    assert isinstance(config, TransMambaConfig)
    assert timing.point is not None
    config.transpoints, config.num_hidden_layers = [timing.point], 1
    # from a model: it chooses the attention, as for the training steps
    mixer = AutoModel.from_config(config).layers[0].mixers[0].to(timing.device).train()
    x_TH = torch.randn(timing.length, config.hidden_size, device=timing.device, requires_grad=True)

    def run() -> None:
        layout = SequenceLayout.build(1, timing.length, timing.device, packed=True)
        with precision(timing):
            y_TH = mixer(x_TH, layout)
        y_TH.sum().backward()

    return run, sum(parameter.numel() for parameter in mixer.parameters())


def main() -> None:
    """Measure what the command line asks for."""
    timing = CausalTiming(**json.loads(sys.argv[1]))
    print_result(lambda: measure(timing), timing.device, timing.threads)


if __name__ == "__main__":
    main()
