"""How to cut the selective scan's work on a GPU: its time with `CUT` changed in one way or another.

    PYTHONPATH=src:. python -m benchmarks.cuts [--shapes 32x4096 1x4096] [--json cuts.json]

Every way compiles anew, all of them at once first. What is best belongs into `CUT`.
"""

import argparse
import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from benchmarks.gpu import backward_alone, milliseconds, scan_inputs
from benchmarks.measure import stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mabert.files import atomic_write
from mabert.ops import selective_scan
from mabert.ops.selective_scan import kept, triton

AT_ONCE = 14
CHANGES: list[dict[str, int]] = [
    {},
    {"ahead": 0},
    {"ahead": 32},
    {"steps": 2, "registers": 128},
    {"steps": 2, "registers": 104},
    {"steps": 4, "registers": 104},
    {"steps": 8, "registers": 168},
    *({"steps_back": 2, "registers_back": registers} for registers in (128, 200, 255)),
    *({"steps_back": 1, "registers_back": registers} for registers in (128, 168, 255)),
    {"steps_back": 4, "registers_back": 255},
    {"kept_every": 8},
    {"programs": 4096, "shortest": 64},
]


def times(change: dict[str, int], batch: int, length: int, seconds: float) -> dict[str, float]:
    """Milliseconds of inference, of the forward in training, and of the backward."""
    before = triton.CUT
    triton.CUT = replace(before, **change)
    kept.TRITON_KEPT_EVERY = triton.CUT.kept_every
    inputs = scan_inputs(batch, length, True)
    found = {}
    with torch.no_grad():
        found["inference"] = milliseconds(lambda: selective_scan(**inputs, backend="triton"), seconds=seconds)
    found["forward"] = milliseconds(lambda: selective_scan(**inputs, backend="triton"), seconds=seconds)
    y = selective_scan(**inputs, backend="triton")
    assert isinstance(y, Tensor)
    found["backward"] = backward_alone(y, list(inputs.values()), seconds=seconds)
    triton.CUT = before
    return {name: float(str(result["median_ms"])) for name, result in found.items()}


def compile_kernels(change: dict[str, int], shapes: list[tuple[int, int]]) -> None:
    """Leave the code in Triton's cache."""
    for batch, length in shapes:
        times(change, batch, length, 0.0)


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x4096", "32x512", "1x4096", "1x16384"])
    parser.add_argument("--seconds", type=float, default=0.15, help="for each time (default 0.15)")
    parser.add_argument("--json", type=Path, help="write all times into this file")
    arguments = parser.parse_args()
    shapes = [(int(batch), int(length)) for batch, length in (shape.split("x") for shape in arguments.shapes)]
    with multiprocessing.get_context("spawn").Pool(AT_ONCE) as pool:
        pool.starmap(compile_kernels, [(change, shapes) for change in CHANGES], chunksize=1)
    measured = []
    for batch, length in shapes:
        table = Table("changed", "inference ms", "forward ms", "backward ms", title=f"{batch} x {length}")
        for change in CHANGES:
            found = times(change, batch, length, arguments.seconds)
            measured.append({"change": change, "shape": [batch, length], **found})
            text = ", ".join(f"{name} {value}" for name, value in change.items()) or "nothing"
            table.add_row(text, *(f"{found[name]:.3f}" for name in ("inference", "forward", "backward")))
        Console(width=100).print(table)
    if arguments.json:
        content = {"stamp": stamp(), "cut": asdict(triton.CUT), "measured": measured}
        with atomic_write(arguments.json, "w") as file:
            json.dump(content, file, indent=1)


if __name__ == "__main__":
    main()
