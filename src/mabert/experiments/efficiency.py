"""Figure 5 with Tables B5 to B7: time and memory by length, of the paper's six models and two more.

Three protocols. "paper" is the paper's, on a GPU: bfloat16, torch's attention without FlashAttention, nothing
compiled, nothing packed; memory and latency at batch 1, training steps at an effective batch of 32. "best" takes every
model at its best on a GPU: any attention kernel, torch.compile where that is faster, and a batch of mixed lengths,
packed where the model can. "cpu" is for a machine without a GPU, at batch 1 throughout.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from mabert.experiments.architectures import BASELINES, PUBLISHED_LONGEST, architecture
from mabert.experiments.cells import Cell
from mabert.experiments.fresh_process import in_fresh_process
from mabert.experiments.published import published
from mabert.experiments.scales import SCALES, Scale, base
from mabert.experiments.timing import Timing
from mabert.ops.backend import choose_backend
from mabert.training.runs import processor_name

MODELS = ("MaBERT", *BASELINES, "ModernBERT", "MMMMMMMMMMMM")
KINDS = ("inference", "training")
# What a process may take beside its repetitions: to start, to compile; and how many times over a single run may take.
START_SECONDS = 120
PATIENCE = 5


@dataclass(frozen=True)
class Protocol:
    """How every model is measured."""

    precisions: tuple[str, ...]
    rows: dict[str, int]
    """Of a batch, by kind."""
    warm_up: int
    repetitions: int
    """At most; a scale may want fewer."""
    choices: dict[str, Any]
    """More fields of `Timing`."""
    longest_training: int | None = None
    """Rows of training steps are no longer than that."""


PROTOCOLS = {
    # MaBERT packs by default; rows without pads give it nothing to leave out
    "cpu": Protocol(("fp32", "bf16"), {"inference": 1, "training": 1}, 1, 5, {"device": "cpu"}, longest_training=2048),
    "paper": Protocol(
        ("bf16",),
        {"inference": 1, "training": 32},
        20,
        100,
        {"device": "cuda", "execution": "padded", "sdpa_kernels": ["MATH", "EFFICIENT_ATTENTION"]},
    ),
    # CHOICE: attention without dropout, which kernels for sequences of mixed lengths do not have
    "best": Protocol(
        ("bf16",),
        {"inference": 8, "training": 32},
        20,
        100,
        {"device": "cuda", "mixed_lengths": True, "attention_dropout": False, "compiled": True},
    ),
}


def protocols() -> tuple[str, ...]:
    """Those that this machine can measure by: the GPU's where it has one."""
    return ("paper", "best") if torch.cuda.is_available() else ("cpu",)


def efficiency_cells(scale: Scale, names: Iterable[str] | None = None) -> list[Cell]:
    """A cell for every protocol, precision, kind, model and length, each measured in a process of its own.

    Args:
        names: protocols; by default those of this machine.
    """
    return [
        efficiency_cell(scale, name, precision, kind, model, length)
        for name in names or protocols()
        for precision in PROTOCOLS[name].precisions
        for kind in KINDS
        for length in lengths(scale, name, kind)
        for model in MODELS
    ]


def lengths(scale: Scale, name: str, kind: str) -> Sequence[int]:
    """Of the rows in a protocol's cells of one kind."""
    if kind == "inference":
        return scale.efficiency_lengths
    longest = PROTOCOLS[name].longest_training
    return [length for length in scale.efficiency_training_lengths if longest is None or length <= longest]


def efficiency_cell(scale: Scale, name: str, precision: str, kind: str, model: str, length: int) -> Cell:
    """One of them."""
    protocol = PROTOCOLS[name]
    timing = Timing(
        architecture=model,
        size=size_of(SCALES[scale.efficiency_scale]()),
        length=length,
        training=kind == "training",
        bf16=precision == "bf16",
        rows=protocol.rows[kind],
        warm_up=protocol.warm_up,
        repetitions=min(protocol.repetitions, scale.repetitions),
        seconds=scale.cell_seconds,
        threads=threads(protocol.choices["device"]),
        **protocol.choices,
    )
    return Cell(
        name=f"efficiency/{name}/{precision}/{kind}/{model}/{length}",
        config=asdict(timing) | {"hardware": hardware()},  # times of two machines are not of one table
        run=partial(
            in_fresh_process,
            "mabert.experiments.timing",
            asdict(timing),
            seconds=START_SECONDS + PATIENCE * timing.seconds,
        ),
        alone=True,
    )


@cache
def hardware() -> str:
    """What the times are measured on: a card, or a processor and the instructions that torch makes use of; and what
    slows MaBERT alone down, where its kernels are missing."""
    has_card = torch.cuda.is_available()
    processor = f"{processor_name()}, {torch.backends.cpu.get_cpu_capability().lower()}"
    found = torch.cuda.get_device_name() if has_card else processor
    chosen = choose_backend("selective_scan", torch.device("cuda" if has_card else "cpu"), torch.float32)
    return f"{found}, without kernels" if chosen == "torch" else found


def threads(device: str) -> int | None:
    """Those that a measured process on a CPU has: as many as this one."""
    return torch.get_num_threads() if device == "cpu" else None


def size_of(scale: Scale) -> dict[str, Any]:
    """The fields of a scale that `architecture` reads."""
    fields = ("name", "hidden_size", "num_attention_heads", "intermediate_size", "match_parameters", "stage_lengths")
    return {field: getattr(scale, field) for field in fields}


@dataclass(frozen=True)
class Headline:
    """The paper's one number of each kind: its five baselines beside MaBERT at the longest length."""

    length: int
    baselines_ms: float
    """Their mean."""
    mabert_ms: float

    @property
    def ratio(self) -> float:
        """How many times as long the baselines take."""
        return self.baselines_ms / self.mabert_ms


def headline(times_ms: Mapping[int, Mapping[str, float | None]]) -> Headline | None:
    """From length -> model -> milliseconds; at the longest length that all six have a time for, if there is one."""
    six = ("MaBERT", *BASELINES)
    complete = [length for length, row in times_ms.items() if all(row.get(model) is not None for model in six)]
    if not complete:
        return None
    times = {model: float(times_ms[max(complete)][model] or 0) for model in six}
    return Headline(max(complete), statistics.mean(times[model] for model in BASELINES), times["MaBERT"])


def parameter_table(models: Sequence[str] = MODELS) -> dict[str, dict[str, float | None]]:
    """Parameters at base as sequence classifiers with two labels, in millions, beside the published number."""
    rows = published()["tableB5_params_million_and_peak_memory_MiB_forward_batch1"]
    return {
        model: {"millions": parameters(model) / 1e6, "published": rows[model]["params"] if model in rows else None}
        for model in models
    }


def parameters(model: str) -> int:
    """Of a sequence classifier with two labels at base, as long as it was published."""
    config = architecture(model, base(), longest=PUBLISHED_LONGEST.get(model, 512))
    config.num_labels = 2
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    return sum(parameter.numel() for parameter in classifier.parameters())
