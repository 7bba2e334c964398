"""The part of the results on what Triton's compiler makes of the GPU kernels, from results/triton-code.json."""

import json
from pathlib import Path

MEASURED = Path(__file__).resolve().parent.parent / "results" / "triton-code.json"
# Of a multiprocessor of compute capability 9.0.
REGISTERS, MOST_PROGRAMS = 65536, 32


def section() -> str:
    """The Markdown of the section, empty while the file is missing."""
    if not MEASURED.exists():
        return ""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    stamp, cut = results["stamp"], results["cut"]
    rows = [row for row in results["rows"] if row["state"] == 16]
    changes = " with uncommitted changes" if stamp["uncommitted_changes"] else ""
    lines = [
        "## The GPU kernels, compiled",
        "",
        "What the compiler says of the Triton kernels at N = 16 in bfloat16 for compute capability "
        f"{results['arch'] / 10:.1f}; nothing here is a time. Registers of a thread (the scan is held to "
        f"{cut['registers']} in the forward and {cut['registers_back']} in the backward), bytes that do not fit into "
        "them, shared memory of a program, how many programs the registers leave room for on a multiprocessor (at most "
        f"{MOST_PROGRAMS}), and, for the scan, the instructions of its first loop over a tile: {cut['steps']} steps of "
        f"32 channels with all their states, {cut['steps_back']} in `_gradients`.",
        "",
        "| kernel | rows | registers | spilled bytes | shared bytes | programs at once | loop |",
        "|---|---|---|---|---|---|---|",
        *[table_row(row) for row in rows],
        "",
        f"By `python -m benchmarks.triton_code`; triton {results['triton']}, mabert {stamp['versions']['mabert']}; "
        f"commit {stamp['commit'][:7]}{changes}; {stamp['date']}.",
    ]
    return "\n".join(lines) + "\n"


def table_row(row: dict) -> str:
    """One kernel."""
    # registers are handed out to a warp 256 at a time
    programs = min(MOST_PROGRAMS, REGISTERS // (-(-row["registers"] * 32 // 256) * 256 * row["warps"]))
    operation = "scan" if "selective_scan" in row["module"] else "convolution"
    loop = str(sum(row["inner_loop"].values())) if operation == "scan" and row["inner_loop"] else ""
    return (
        f"| {operation} `{row['kernel']}` | {row['variant']} | {row['registers']} | {row['spilled_bytes']} | "
        f"{row['shared_bytes']} | {programs} | {loop} |"
    )
