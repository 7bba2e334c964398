"""Time and memory that a training run will take, measured on this machine before it begins."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from mabert.training.optim import adamw


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a run on this machine, extrapolated from a few sequences of each kind."""

    seconds: float
    """Of the whole run, without evaluations, checkpoints and waiting for other processes."""
    step_seconds: tuple[float, ...]
    """Of one optimizer step with each kind of micro-batch: for pretraining, of each stage."""
    weights: int
    gradients: int
    optimizer: int
    """Bytes of Adam's two moments."""
    activations: int
    """Bytes that one micro-batch saves for the backward pass, where it saves the most."""

    @property
    def memory(self) -> int:
        """Bytes of all of these, in each process."""
        return self.weights + self.gradients + self.optimizer + self.activations


def measure(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    steps: Sequence[int],
    accumulation: int,
    scale: float = 1.0,
    bf16: bool,
) -> Estimate:
    """Measure one forward and backward pass of each micro-batch, and one optimizer step.

    The run takes `steps[i]` optimizer steps with micro-batches like `batches[i]` but `scale` times as many sequences,
    `accumulation` of them each. Time and activations grow in proportion to the sequences.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model.to(device).train()  # type: ignore[arg-type]
    optimizer = adamw(model, learning_rate=0.0)
    micro_seconds, saved = [], []
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}

        def forward_backward(inputs: dict[str, Tensor] = inputs) -> None:
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss = model(**inputs).loss
            loss.backward()

        saved.append(_saved_bytes(model, forward_backward))  # the warm-up as well
        micro_seconds.append(_seconds(forward_backward, device))
    optimizer.step()  # the first step makes the moments
    optimizer_seconds = _seconds(optimizer.step, device)
    step_seconds = tuple(accumulation * scale * seconds + optimizer_seconds for seconds in micro_seconds)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Estimate(
        seconds=sum(count * seconds for count, seconds in zip(steps, step_seconds, strict=True)),
        step_seconds=step_seconds,
        weights=weights,
        gradients=weights,
        optimizer=2 * weights,
        activations=round(scale * max(saved)),
    )


def _saved_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, the parameters' own not at all."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began
