"""What Triton makes of the GPU kernels, without a GPU: registers, spills, shared memory, and the length of inner loops.

    python -m benchmarks.triton_code [--output results/triton-code.json]

Compiles every kernel for an NVIDIA GPU (`--arch 90` is an H100 or H200) and reads what came out. It measures nothing:
it shows whether a thread still holds a whole tile, and what a state's step costs in instructions.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from benchmarks.measure import stamp
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mabert.files import atomic_write
from mabert.ops.depthwise_conv import triton as conv
from mabert.ops.gpu import INTERPRETED
from mabert.ops.selective_scan import triton as scan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STRIDES = ("x_row", "x_time", "delta_row", "delta_time", "z_row", "z_time", "B_row", "B_time", "C_row", "C_time")
# Of the numbers that change from call to call nothing is known; strides and channels of a model are multiples of 16.
INTEGERS = (*STRIDES, "inner", "length", "padded_length", "steps", "stretches", "width")
BYTES, INDICES = ("mask",), ("sequence_of", "nearest")


def kernels(state: int) -> list[tuple[Any, dict[str, object], dict[str, str]]]:
    """Every kernel with its constants and with what its pointers point to if not to float32, dense and packed."""
    rows = dict.fromkeys(("x", "delta", "z", "dy", "y", "dx", "ddelta", "dz", "weight", "bias"), "*bf16")
    padded = triton.next_power_of_2(state)
    cut: dict[str, object] = {"N": state, "PADDED_N": padded, "T": scan.CUT.steps, "BLOCK": scan.CUT.block(state)}
    cut |= {"SOFTPLUS": True, "REVERSE": False, "KEPT_EVERY": scan.CUT.kept_every, "AHEAD": scan.CUT.ahead}
    back = {"T": scan.CUT.steps_back}
    in_order = {"N": state, "PADDED_N": padded, "T": scan.CUT.kept_every, "REVERSE": False, "mask": None}
    taps = {"W": 4, "LEFT": 1, "SILU": True, "T": conv.TILE, "BLOCK": conv.BLOCK}
    per_scan = rows | {"bias": "*fp32"}
    several: list[tuple[Any, dict[str, object], dict[str, str]]] = [
        (scan._in_scan_order, in_order, {"B": "*bf16", "C": "*bf16"}),
        (scan._carry_over, {"N": state, "BACKWARDS": False, "BLOCK": 128, "outside": None}, {}),
    ]
    plain = {"mask": None, "initial": None, "entering": None, "dfinal": None, "dinitial": None}
    everything = {"REVERSE": True}
    for layout in (plain | {"sequence_of": None, "nearest": None}, plain, everything):
        several += [
            (scan._leave, cut | layout, per_scan),
            (scan._read_out, cut | layout, per_scan),
            (scan._leave_backwards, cut | layout, per_scan),
            (scan._gradients, cut | back | layout, per_scan),
            (conv._forward, taps | layout, rows),
            (conv._backward, taps | layout | {"TILES": conv.TILES}, rows),
        ]
    return [
        (kernel, {k: v for k, v in constants.items() if k in kernel.arg_names}, pointers)
        for kernel, constants, pointers in several
    ]


def compiled(kernel: Any, constants: dict[str, object], pointers: dict[str, str], arch: int) -> Any:
    """A kernel for some GPU, with what Triton would know of a base-size model's tensors."""
    signature, known, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[(place,)] = "constexpr", constants[name]
        elif name in INTEGERS:
            signature[name] = "i32"
            if name in (*STRIDES, "inner"):
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            kind = "*u8" if name in BYTES else "*i32" if name in INDICES else "*fp32"
            signature[name] = pointers.get(name, kind)
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, aligned)
    options = {"num_warps": warps_of(kernel), **most_registers(kernel)}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def warps_of(kernel: Any) -> int:
    """Of one program, with up to 32 states."""
    return conv.WARPS if kernel.fn.__module__ == conv.__name__ else 1


def most_registers(kernel: Any) -> dict[str, int]:
    """Of a thread, where the compiler is told."""
    if kernel in (scan._read_out, scan._leave, scan._leave_backwards):
        return {"maxnreg": scan.CUT.registers}
    return {"maxnreg": scan.CUT.registers_back} if kernel is scan._gradients else {}


def loops(cubin: bytes) -> list[Counter[str]]:
    """Instructions of every loop by kind, the smallest loop first; none where the disassembler is missing."""
    if not (TOOLS / "cuobjdump").exists():
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = run_tool("cuobjdump", "-sass", str(path))
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)([^;]*);", listing)
    found = []
    for address, name, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target and int(target[1], 16) < int(address, 16):
            inside = range(int(target[1], 16), int(address, 16) + 1)
            found.append(Counter(kind for place, kind, _ in lines if int(place, 16) in inside))
    return sorted(found, key=Counter.total)


def run_tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that come with Triton."""
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread."""
    if not (TOOLS / "cuobjdump").exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run_tool("cuobjdump", "-res-usage", str(path))
    return {
        name: int(re.findall(rf"{key}:(\d+)", usage)[-1])
        for name, key in (("registers", "REG"), ("spilled_bytes", "STACK"))
    }


def describe(state: int, arch: int) -> list[dict[str, object]]:
    """One row a kernel."""
    described = []
    for kernel, constants, pointers in kernels(state):
        code = compiled(kernel, constants, pointers, arch)
        inner = loops(code.asm["cubin"])
        tile = 4 * constants["T"] if "T" in constants else 0
        smallest = next((loop for loop in inner if loop["MUFU"] >= tile / 4 > 0), Counter())
        described.append(
            {
                "kernel": kernel.fn.__name__,
                "module": kernel.fn.__module__,
                "variant": variant(kernel, constants),
                "state": state,
                "warps": warps_of(kernel),
                **resources(code.asm["cubin"]),
                "shared_bytes": code.metadata.shared,
                "shuffles": code.asm["ptx"].count("shfl.sync"),
                "inner_loop": dict(smallest.most_common()),
            }
        )
    return described


def variant(kernel: Any, constants: dict[str, object]) -> str:
    """Which of its layouts a kernel is compiled for."""
    if "sequence_of" not in kernel.arg_names:
        return ""
    if "sequence_of" in constants:
        return "rows"
    return "packed" if "mask" in constants else "packed, masked, reversed"


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=int, nargs="+", default=[16], help="numbers of states (default 16)")
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the dot (default 90)")
    parser.add_argument("--json", action="store_true", help="print what other programs read")
    parser.add_argument("--output", type=Path, help="write it into a file, with commit and versions")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.exit(2, "TRITON_INTERPRET is set: nothing is compiled then. Unset it.\n")
    if shutil.which("cuobjdump", path=TOOLS) is None:
        print("this Triton brings no cuobjdump: registers and loops are left out", file=sys.stderr)
    rows = [row for state in arguments.state for row in describe(state, arguments.arch)]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "stamp": stamp(),
            "triton": triton.__version__,
            "arch": arguments.arch,
            "cut": asdict(scan.CUT),
            "rows": rows,
        }
        with atomic_write(arguments.output, "w") as file:
            json.dump(content, file, indent=1)
    if arguments.json:
        print(json.dumps(rows))
        return
    columns = ("kernel", "variant", "state", "registers", "spilled_bytes", "shared_bytes")
    table = Table("kernel", "variant", "N", "registers", "spilled bytes", "shared bytes", "inner loop, instructions")
    for row in rows:
        loop = Counter(row["inner_loop"])
        kinds = ", ".join(f"{count} {kind}" for kind, count in loop.most_common(6))
        table.add_row(
            *(str(row.get(name, "")) for name in columns),
            f"{loop.total()}: {kinds}" if loop else "",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
