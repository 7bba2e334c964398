"""How to cut the selective scan's work on a GPU: its time for many ways of doing so.

    PYTHONPATH=src:. python -m benchmarks.cuts [--shapes 32x4096 1x4096] [--json cuts.json]

Every way compiles anew, all of them at once first. The best ones belong into `CUT` and `TRITON_KEPT_EVERY`.
"""

import argparse
import itertools
import json
import multiprocessing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from benchmarks.gpu import backward_alone, milliseconds, scan_inputs
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mabert.files import atomic_write
from mabert.ops import selective_scan
from mabert.ops.selective_scan import kept, triton

AT_ONCE = 12


@dataclass(frozen=True)
class Way:
    """One of the ways; `tile` is `TRITON_KEPT_EVERY`, the others are those of `Cut`."""

    tile: int
    block: int
    warps: int
    programs: int
    shortest: int

    def choose(self) -> None:
        """Let the kernels go this way from now on."""
        kept.TRITON_KEPT_EVERY = triton.TILE = self.tile
        triton.CUT = triton.Cut(self.block, self.warps, self.programs, self.shortest)


def ways() -> list[Way]:
    """32 channels a warp throughout: fewer leave lanes idle, more do not fit into the registers."""
    shapes = [(16, 32, 1), (8, 32, 1), (16, 64, 2), (8, 64, 2), (8, 128, 4), (4, 32, 1)]
    return [
        Way(tile, block, warps, programs, shortest)
        for (tile, block, warps), (programs, shortest) in itertools.product(
            shapes, [(1024, 64), (2048, 64), (4096, 64), (8192, 64), (16384, 32)]
        )
        if tile == 8 and block == 32 or programs in (2048, 4096)
    ]


def times(way: Way, batch: int, length: int, seconds: float) -> dict[str, float]:
    """Milliseconds of inference, of the forward in training, and of the backward; NaN where it cannot be compiled."""
    way.choose()
    inputs = scan_inputs(batch, length, True)
    found = {}
    with torch.no_grad():
        found["inference"] = milliseconds(lambda: selective_scan(**inputs, backend="triton"), seconds=seconds)
    found["forward"] = milliseconds(lambda: selective_scan(**inputs, backend="triton"), seconds=seconds)
    y = selective_scan(**inputs, backend="triton")
    assert isinstance(y, Tensor)
    found["backward"] = backward_alone(y, list(inputs.values()), seconds=seconds)
    return {name: float(str(result["median_ms"])) for name, result in found.items()}


def compile_kernels(way: Way, shapes: list[tuple[int, int]]) -> None:
    """Leave the code in Triton's cache."""
    for batch, length in shapes:
        times(way, batch, length, 0.0)


def main() -> None:
    """Compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x4096", "32x512", "1x4096", "1x16384"])
    parser.add_argument("--seconds", type=float, default=0.15, help="for each time (default 0.15)")
    parser.add_argument("--json", type=Path, help="write all times into this file")
    arguments = parser.parse_args()
    shapes = [(int(batch), int(length)) for batch, length in (shape.split("x") for shape in arguments.shapes)]
    with multiprocessing.get_context("spawn").Pool(AT_ONCE) as pool:
        pool.starmap(compile_kernels, [(way, shapes) for way in ways()], chunksize=1)
    measured = [
        {"way": asdict(way), "shape": f"{batch} x {length}", **times(way, batch, length, arguments.seconds)}
        for batch, length in shapes
        for way in ways()
    ]
    if arguments.json:
        with atomic_write(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "measured": measured}, file, indent=1)
    for shape in dict.fromkeys(row["shape"] for row in measured):
        table = Table("tile", "block", "warps", "programs", "shortest", "inference", "forward", "backward", title=shape)
        rows = [row for row in measured if row["shape"] == shape]
        for row in sorted(rows, key=lambda row: row["forward"] + row["backward"])[:10]:
            columns = [*map(str, row["way"].values())]
            table.add_row(*columns, *(f"{row[name]:.3f}" for name in ("inference", "forward", "backward")))
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
