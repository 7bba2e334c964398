"""TransMamba's experiments: loss by schedule and against references, time by length, cost of a layer by TransPoint."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from mabert.causal_config import TransMambaConfig
from mabert.experiments.causal_architectures import CAUSAL_REFERENCES, HYBRIDS, causal_architecture, transmamba_name
from mabert.experiments.causal_timing import CausalTiming
from mabert.experiments.cells import Cell
from mabert.experiments.efficiency import PATIENCE, START_SECONDS, hardware, threads
from mabert.experiments.fresh_process import in_fresh_process
from mabert.experiments.pretraining import pretraining_cell
from mabert.experiments.scales import SCALES, CausalScale, Scale
from mabert.experiments.sources import Sources
from mabert.ops.ssd import chunk_steps

MAIN = (transmamba_name("V9"), *CAUSAL_REFERENCES)
"""The paper's last schedule, and what it is compared with."""
SIZE = ("hidden_size", "num_attention_heads", "intermediate_size", "layers", "length")
# PAPER TransMamba: Table 7; the warm-up is ours
RECIPE = {"lr_schedule": "cosine", "min_lr_fraction": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
WARM_UP = 0.05


@dataclass(frozen=True)
class TransPoints:
    """The cells of one scale."""

    sources: Sources
    work: Path
    console: Console

    @property
    def scale(self) -> CausalScale:
        """Of the causal models."""
        return self.sources.scale.causal

    def cells(self) -> Iterator[Cell]:
        """All of them: losses first."""
        for name in models_of(self.scale):
            for seed in range(self.scale.seeds):
                yield self.pretraining(name, seed)
        yield from timing_cells(self.sources.scale)

    def hybrids(self) -> Iterator[Cell]:
        """The hybrids of attention and SSM, by the same recipe."""
        for name in HYBRIDS:
            for seed in range(self.scale.seeds):
                yield self.pretraining(name, seed)

    def pretraining(self, name: str, seed: int = 0) -> Cell:
        """A causal model pretrained on the common text, rows of one sequence each."""
        scale = self.scale
        is_hybrid = name in HYBRIDS | CAUSAL_REFERENCES
        mixers = {key: getattr(scale, key) for key in ("ssm", "sliding_window")} if is_hybrid else {}
        # named where they are other ones: so results from before there was a choice stay what they are
        chosen = {key: value for key, value in mixers.items() if value != getattr(CausalScale, key)}
        return pretraining_cell(
            self.sources,
            f"causal/{name}/{seed}",
            {"architecture": name, "size": size_of(scale), **chosen},
            {
                "steps": scale.steps,
                "batch_size": scale.batch_size,
                "stage_lengths": (scale.length,),
                "stage_fractions": (1.0,),
                "learning_rate": scale.learning_rate,
                "warmup_fraction": WARM_UP,
                "bf16": self.sources.scale.bf16,
                "eval_rows": scale.eval_rows,
                "seed": seed,
                "packing": "full-sentences",
                **RECIPE,
            },
            partial(causal_architecture, name, scale, **mixers),
            self.work / "causal" / name / str(seed),
            scale.micro_batch_size,
            self.console,
        )


def models_of(scale: CausalScale) -> list[str]:
    """The paper's main ones, and TransMamba with the scale's other schedules."""
    return list(dict.fromkeys((*MAIN, *map(transmamba_name, scale.schedules))))


def timing_cells(scale: Scale) -> Iterator[Cell]:
    """Training steps of the models by length, and one layer by length and TransPoint."""
    # CHOICE: fp32 on a CPU, of which many have no instructions for bf16 and are many times slower with it
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    for length in scale.causal.timed_lengths:
        for name in models_of(scale.causal):
            yield _timing(scale, f"causal-step/{precision}/{name}/{length}", name, length, precision, None)
    yield from layer_cells(scale, precision)


def layer_cells(scale: Scale, precision: str) -> Iterator[Cell]:
    """One layer by length and TransPoint."""
    for length in scale.causal.timed_lengths:
        for index in range(scale.causal.timed_points):
            point = length * index // (scale.causal.timed_points - 1)
            yield _timing(scale, f"causal-layer/{precision}/{length}/{point}", MAIN[0], length, precision, point)


def _timing(scale: Scale, cell: str, name: str, length: int, precision: str, point: int | None) -> Cell:
    timed, device = SCALES[scale.causal.timed]().causal, "cuda" if torch.cuda.is_available() else "cpu"
    timing = CausalTiming(
        architecture=name,
        size=size_of(timed),
        length=length,
        point=point,
        bf16=precision == "bf16",
        device=device,
        threads=threads(device),
        repetitions=scale.repetitions,
        seconds=scale.cell_seconds,
    )
    request = asdict(timing)
    limit = START_SECONDS + PATIENCE * timing.seconds
    return Cell(
        name=cell,
        config=request | {"hardware": hardware()},
        run=partial(in_fresh_process, "mabert.experiments.causal_timing", request, seconds=limit),
        alone=True,
    )


def size_of(scale: CausalScale) -> dict[str, int]:
    """The fields of a scale that `causal_architecture` reads."""
    return {name: getattr(scale, name) for name in SIZE}


def mixer_flops(config: TransMambaConfig, length: int, point: int) -> dict[str, float]:
    """Floating-point operations of one mixer's forward pass over a sequence, by part; a multiply-add counts as two.

    The parts without a product (convolution, exponentials, softmax) are left out.
    """
    hidden, width = config.hidden_size, config.head_size
    before = min(point, length)
    after = length - before
    # PAPER TransMamba Eq. 10: P² N + (T − P) N², here with the factors, the chunks and the projections
    return {
        "projections": 2 * hidden * (4 * hidden + config.num_attention_heads) * length + 2 * hidden**2 * after,
        "attention": 2 * before * (before + 1) * hidden,  # scores and their products with values, half of them masked
        "converter": 2.0 * before * hidden * width if after else 0.0,
        # within the chunks; to the states and from them
        "scan": after * hidden * (4 * chunk_steps(width**2) + 4 * width),
    }
