"""Time and memory of one model at one length, measured in the process that runs this module:

    python -m mabert.experiments.timing '{"architecture": "BERT", ...}'

The argument is a `Timing` as JSON; the last line printed is the result.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from mabert.config import MaBertConfig
from mabert.data.mlm import IGNORED
from mabert.experiments.architectures import architecture
from mabert.experiments.fresh_process import peak_resident_bytes, restart_peak
from mabert.experiments.packed_attention import PACKED_ATTENTION, can_be_packed, pack
from mabert.experiments.scales import Scale
from mabert.models import MaBertForMaskedLM
from mabert.training.objectives import labelled_logits
from mabert.training.optim import adamw

BLOCK_SPARSE_ABOVE = 704
"""Tokens up to which BigBird attends to all others, for good once it has met so short a batch."""
TOKEN_IDS = (5, 30_000)  # no special tokens, and in every vocabulary
LABEL_EVERY = 7  # tokens: about the 15% of the recipe
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is measured, and how, as JSON values."""

    architecture: str
    size: dict[str, Any]
    """Fields of a `Scale` that say how large the model is."""
    length: int
    training: bool
    """A step of masked language modelling with dropout and the optimizer, instead of the encoder's inference."""
    bf16: bool
    """Autocast of float32 weights."""
    device: str
    """cpu or cuda."""
    threads: int | None = None
    """Of a CPU; torch's own number by default."""
    rows: int = 1
    """Sequences of a batch. A training step takes as many of them at a time as fit on a GPU, and accumulates."""
    warm_up: int = 1
    repetitions: int
    seconds: float
    """Begin no repetition that would end later than this."""
    mixed_lengths: bool = False
    """Row i of n has i/n of the length; pads are left out where the model can, instead of rows without pads."""
    execution: str = "packed"
    """MaBERT's; with "padded" goes psm="pre+post"."""
    attention_dropout: bool = True
    sdpa_kernels: list[str] | None = None
    """What torch's attention may use, by their names in `SDPBackend`; all by default."""
    compiled: bool = False
    """Measure with torch.compile as well; the faster way counts."""


@dataclass(frozen=True)
class Batch:
    """What a model is given, and the tokens to predict."""

    inputs: dict[str, Any]
    labels: Tensor
    targets: Tensor


def measure(timing: Timing) -> dict[str, Any]:
    """Median and samples in milliseconds, the most memory used, and how the model attended.

    Raises:
        torch.OutOfMemoryError: the GPU's memory does not suffice for a single row.
        RuntimeError: BigBird did not attend as it should at this length.
    """
    torch.manual_seed(0)
    model = build(timing)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }
    ways = {"plain": measure_as_it_is(model, timing)}
    if timing.compiled:
        compile_in_place(model)
        try:
            ways["compiled"] = measure_as_it_is(model, timing)
        except (MemoryError, RuntimeError) as error:  # the compiler's errors are RuntimeErrors
            why = "out_of_memory" if is_out_of_memory(error) else "does_not_compile"
            ways["compiled"] = {why: f"{type(error).__name__}: {error}"[:500]}
    way = min(ways, key=lambda name: ways[name].get("median_ms", float("inf")))
    if timing.compiled:
        result |= {"way": way, "other_ways": {name: ways[name] for name in ways if name != way}}
    if model.config.model_type == "big_bird":
        result["big_bird_attention"] = checked_big_bird_attention(model, timing.length)
    return ways[way] | result


def build(timing: Timing) -> PreTrainedModel:
    """The model, with random weights, where it is to run."""
    config = architecture(timing.architecture, Scale(**timing.size), longest=timing.length)
    if isinstance(config, MaBertConfig) and timing.execution == "padded":
        config.execution, config.psm = "padded", "pre+post"
        config.check()
    if not timing.attention_dropout:
        for field in ("attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(config, field):
                setattr(config, field, 0.0)
    choices = {"attn_implementation": PACKED_ATTENTION} if is_packed_row(timing, config) else {}
    kind = AutoModelForMaskedLM if timing.training else AutoModel
    with torch.device(timing.device):  # a GPU draws a hundred million weights sooner
        model = kind.from_config(config, **choices)
    model = model.to(timing.device).train(timing.training)  # with what was made from numpy
    if timing.bf16 and timing.device == "cpu" and config.model_type == "big_bird":
        give_big_bird_one_dtype(model)
    return model


def is_packed_row(timing: Timing, config: PreTrainedConfig) -> bool:
    """Whether all sequences lie in one row, whose boundaries the model is told; MaBERT packs a padded batch itself."""
    return timing.mixed_lengths and can_be_packed(config)


def give_big_bird_one_dtype(model: PreTrainedModel) -> None:
    """Hand everything to block-sparse attention in bfloat16, its masks too.

    Otherwise, under autocast on a CPU, transformers multiplies its output with a float32 mask and then scatters
    bfloat16 weights into a tensor of that dtype, which torch refuses.
    """

    def in_bfloat16(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        def cast(value: Any) -> Any:
            return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

        return tuple(map(cast, arguments)), {name: cast(value) for name, value in keywords.items()}

    for module in model.modules():
        if type(module).__name__ == "BigBirdBlockSparseAttention":
            module.register_forward_pre_hook(in_bfloat16, with_kwargs=True)


def checked_big_bird_attention(model: PreTrainedModel, length: int) -> str:
    """BigBird's kind of attention after it has run.

    Raises:
        RuntimeError: it is not the one that goes with the length.
    """
    kind = str(model.base_model.attention_type)
    expected = "block_sparse" if length > BLOCK_SPARSE_ABOVE else "original_full"
    if kind != expected:
        raise RuntimeError(f"BigBird ran with attention {kind!r} at {length} tokens, where {expected!r} is its own.")
    return kind


def compile_in_place(model: PreTrainedModel) -> None:
    """Compile all of an encoder or of MaBERT, and of another masked language model its encoder.

    What picks the labelled positions between the encoder and the head is not to be compiled: it changes at every batch.
    """
    if model.base_model is model or isinstance(model, MaBertForMaskedLM):
        model.compile()
    else:
        setattr(model, model.base_model_prefix, torch.compile(model.base_model))


def measure_as_it_is(model: PreTrainedModel, timing: Timing) -> dict[str, Any]:
    """Time and memory, with as many rows at a time as fit on the GPU."""
    micro_batch = timing.rows
    while True:
        try:
            return measure_rows(model, timing, micro_batch)
        except torch.OutOfMemoryError:
            if not timing.training or micro_batch == 1:
                raise
        micro_batch //= 2  # outside of the handler, which keeps alive what was in use
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def measure_rows(model: PreTrainedModel, timing: Timing, micro_batch: int) -> dict[str, Any]:
    """Time and memory with so many rows at a time."""
    with memory(timing.device) as used:
        run = training_step(model, timing, micro_batch) if timing.training else inference(model, timing)
        samples = repeat(run, milliseconds(run, timing.device), timing)
    return samples | used | {"micro_batch": micro_batch, "tokens": sum(lengths(timing))}


def inference(model: PreTrainedModel, timing: Timing) -> Callable[[], None]:
    """One pass of a batch through the encoder."""
    batch = make_batch(model.config, timing, lengths(timing))

    def run() -> None:
        with torch.no_grad(), arithmetic(timing):
            model(**batch.inputs)

    return run


def training_step(model: PreTrainedModel, timing: Timing, micro_batch: int) -> Callable[[], None]:
    """One step of the optimizer over all rows, `micro_batch` of them at a time."""
    batches = [
        make_batch(model.config, timing, lengths(timing)[first : first + micro_batch])
        for first in range(0, timing.rows, micro_batch)
    ]
    labels = sum(len(batch.targets) for batch in batches)
    optimizer = adamw(model, learning_rate=LEARNING_RATE)

    def run() -> None:
        for batch in batches:
            with arithmetic(timing):
                logits = labelled_logits(model, batch.inputs, batch.labels)  # as in pretraining
                loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum") / labels
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


@contextlib.contextmanager
def arithmetic(timing: Timing) -> Iterator[None]:
    """The precision, and the kernels that attention may use."""
    kernels = timing.sdpa_kernels
    chosen = sdpa_kernel([getattr(SDPBackend, name) for name in kernels]) if kernels else contextlib.nullcontext()
    with torch.autocast(timing.device, torch.bfloat16, enabled=timing.bf16), chosen:
        yield


def lengths(timing: Timing) -> list[int]:
    """Tokens of each row."""
    if not timing.mixed_lengths:
        return [timing.length] * timing.rows
    return [timing.length * (row + 1) // timing.rows for row in range(timing.rows)]


def make_batch(config: PreTrainedConfig, timing: Timing, row_lengths: list[int]) -> Batch:
    """Random tokens in rows of these lengths, padded at the end or packed into one row."""
    width = max(row_lengths)
    if config.model_type == "big_bird":  # a short batch would change its attention for the long ones as well
        width = max(width, min(timing.length, BLOCK_SPARSE_ABOVE + 1))
    shape = (len(row_lengths), width)
    mask = torch.arange(width) < torch.tensor(row_lengths)[:, None]
    ids = torch.where(mask, torch.randint(*TOKEN_IDS, shape), config.pad_token_id)
    labels = torch.where(mask & (torch.arange(width) % LABEL_EVERY == 0), ids, IGNORED)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if is_packed_row(timing, config):
        inputs, labels = pack(ids, row_lengths), labels[mask][None]
    inputs = {name: value.to(timing.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    labels = labels.to(timing.device)
    return Batch(inputs, labels, labels[labels != IGNORED])


class Repetitions(Protocol):
    """What `repeat` reads of a timing."""

    @property
    def device(self) -> str:
        """cpu or cuda."""

    @property
    def warm_up(self) -> int:
        """Runs that do not count."""

    @property
    def repetitions(self) -> int:
        """Runs that count, at most."""

    @property
    def seconds(self) -> float:
        """Begin none that would end later than this."""


def repeat(run: Callable[[], None], first_ms: float, timing: Repetitions) -> dict[str, Any]:
    """Repeat what has run once. Warming up has its share of the time; if that leaves none, its last run counts."""
    warm_up_share = timing.warm_up / (timing.warm_up + timing.repetitions)
    # On a GPU the first run compiles kernels: of what follows it says nothing.
    spent = first_ms if timing.device == "cpu" else 0.0
    warm: list[float] = [first_ms]
    samples: list[float] = []
    while len(warm) < timing.warm_up and spent < 1e3 * timing.seconds * warm_up_share:
        warm.append(milliseconds(run, timing.device))
        spent += warm[-1]
    while len(samples) < timing.repetitions and spent + (samples or warm)[-1] <= 1e3 * timing.seconds:
        samples.append(milliseconds(run, timing.device))
        spent += samples[-1]
    counted = samples or warm[-1:]
    return {
        "median_ms": statistics.median(counted),
        "samples_ms": counted,
        "repetitions": len(counted),
        "warm_up": len(warm),
        "warm_up_counted": not samples,
        "first_ms": first_ms,
    }


def milliseconds(run: Callable[[], None], device: str) -> float:
    """Of one run, from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


@contextlib.contextmanager
def memory(device: str) -> Iterator[dict[str, int]]:
    """Fill a result with the most memory in use at once within the block, and by how much that is more than before.

    On a CPU it is what is resident, Python and libraries included; on a GPU, what torch has allocated.
    """
    used: dict[str, int] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield used
        peak = torch.cuda.max_memory_allocated()
        used |= {"peak_gpu_bytes": peak, "extra_gpu_bytes": peak - before}
    else:
        before = restart_peak()
        yield used
        peak = max(before, peak_resident_bytes())  # the kernel is a few pages out in either
        used |= {"peak_resident_bytes": peak, "extra_resident_bytes": peak - before}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the system's allocator refused."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def print_result(measured: Callable[[], dict[str, Any]], device: str, threads: int | None) -> None:
    """As JSON, for the process that waits for it; want of memory is a result."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result = measured()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"out_of_memory": True}
    if device == "cuda":
        result["memory_limit_bytes"] = torch.cuda.get_device_properties(0).total_memory
    print(json.dumps(result))


def main() -> None:
    """Measure what the command line asks for."""
    timing = Timing(**json.loads(sys.argv[1]))
    print_result(lambda: measure(timing), timing.device, timing.threads)


if __name__ == "__main__":
    main()
