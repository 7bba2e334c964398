"""The part of the results on the kernels' times on a GPU, from results/gpu.json."""

import json
from pathlib import Path

MEASURED = Path(__file__).resolve().parent.parent / "results" / "gpu.json"
KERNELS = {
    "scan forward, triton": "scan forward",
    "scan backward, triton": "scan backward",
    "conv forward, triton": "convolution forward",
    "conv backward, triton": "convolution backward",
}


def section() -> str:
    """The Markdown of the section, empty while the file is missing."""
    if not MEASURED.exists():
        return ""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    cells = results["cells"]
    rate = cells["copy"]["bytes_per_s"]
    stamp = cells["copy"]["stamp"]
    shapes = list(dict.fromkeys(name.rsplit(", ", 1)[1] for name in cells if name.startswith("scan")))
    lines = [
        "## The kernels on a GPU",
        "",
        f"Milliseconds of one call in bfloat16 with {results['channels']:,} channels and 16 states, rows × tokens, "
        "and in brackets how many times the time that its reads and writes of full rows would take at the speed of a "
        "large copy "
        f"({rate / 1e12:.2f} TB/s, read and written). Medians by the GPU's clock; a call's way through Python counts, "
        "and decides the small ones. The torch fallback stands beside where it was measured.",
        "",
        f"| rows × tokens | {' | '.join(KERNELS.values())} | torch: scan forward | scan backward |",
        "|---|---|---|---|---|---|---|",
        *[table_row(shape, results) for shape in sorted(shapes, key=by_size)],
        "",
        f"{stamp['hardware']['gpu']}, torch {stamp['versions']['torch']}, by `python -m benchmarks.gpu`; commit "
        f"{stamp['commit'][:7]}; {stamp['date']}.",
    ]
    return "\n".join(lines) + "\n"


def by_size(shape: str) -> tuple[int, int]:
    """Rows and tokens of a shape."""
    batch, length = shape.split(" x ")
    return int(batch), int(length)


def table_row(shape: str, results: dict) -> str:
    """All kernels at one shape."""
    cells, rate = results["cells"], results["cells"]["copy"]["bytes_per_s"]
    batch, length = by_size(shape)
    columns = []
    for kernel in (*KERNELS, "scan forward, torch", "scan backward, torch"):
        cell = cells.get(f"{kernel}, {shape}")
        if cell is None:
            columns.append("")
            continue
        rows = results["rows_moved"][kernel.split(",")[0]]
        floor_ms = rows * batch * length * results["channels"] * 2 / rate * 1e3
        columns.append(f"{cell['median_ms']:.2f} ({cell['median_ms'] / floor_ms:.0f}×)")
    return f"| {batch} × {length:,} | {' | '.join(columns)} |"
