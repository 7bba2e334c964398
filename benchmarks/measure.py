"""How the benchmarks measure: medians with spread, peak memory, what the machine can do, and what ran on what."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from mabert.experiments import stamp as stamps
from mabert.experiments.fresh_process import peak_resident_bytes, restart_peak
from mabert.ops import native

MILLI = 1e3


def timings(
    runs: dict[str, Callable[[], object]], *, seconds: float = 3.0, at_least: int = 5, at_most: int = 100
) -> dict[str, dict[str, float]]:
    """Milliseconds of each run, over as many rounds as fit into `seconds` for each.

    In every round each of them runs twice, and the second time counts: a slow minute of the machine slows all of them,
    and none finds the caches and the allocator as another one left them.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    rounds = 0
    while rounds < at_least or (time.perf_counter() < end and rounds < at_most):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            samples[name].append((time.perf_counter() - start) * MILLI)
        rounds += 1
    return {name: _summary(values) for name, values in samples.items()}


def timing(run: Callable[[], object], *, seconds: float = 3.0) -> dict[str, float]:
    """`timings` of one run."""
    return timings({"": run}, seconds=seconds)[""]


def _summary(samples: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return {
        "median_ms": median,
        "lower_quartile_ms": lower,
        "upper_quartile_ms": upper,
        "repetitions": len(samples),
    }


def ratio(over: dict[str, float], under: dict[str, float]) -> float:
    """Of two medians."""
    return over["median_ms"] / under["median_ms"]


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, as it does in any process that has run for a while (glibc).

    It raises its threshold for giving memory back to the system when the first large block is freed, up to 32 MiB.
    """
    torch.empty(2**23 - 2**12).fill_(0)


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Growth of the resident memory at its highest point while `run` runs (Linux). Call it in a fresh process."""
    before = restart_peak()
    run()
    return peak_resident_bytes() - before


def machine_rates() -> dict[str, float]:
    """What this machine reaches with torch's threads: bytes copied, multiply-adds and powers of two a second."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    copy = timing(lambda: target.copy_(source), seconds=1.0)
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = timing(lambda: a @ b, seconds=2.0)
    rates = {
        "copy_bytes_per_s": 2 * source.numel() * 4 / copy["median_ms"] * MILLI,
        "fma_per_s": size**3 / product["median_ms"] * MILLI,
    }
    if native.kernels is not None:
        x = -torch.rand(4096)  # stays in the first-level cache
        y = torch.empty_like(x)

        def powers(count: int) -> None:
            for _ in range(100):
                native.kernels.vector_function(3, x.data_ptr(), y.data_ptr(), count)

        both = timings({"many": partial(powers, x.numel()), "few": partial(powers, 64)}, seconds=0.5)
        seconds = (both["many"]["median_ms"] - both["few"]["median_ms"]) / MILLI  # without the calls themselves
        rates["exp_per_s"] = 100 * (x.numel() - 64) / seconds * torch.get_num_threads()
    return rates


def stamp() -> dict[str, object]:
    """What a number comes from, and how busy machine and process have been before."""
    return {
        **stamps.stamp(),
        "load_average_before": os.getloadavg()[0],
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
