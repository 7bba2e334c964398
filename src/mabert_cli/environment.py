"""`mabert env`: what this machine has, and which implementation of each op runs on it."""

import logging
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from mabert_cli.console import output, table

if TYPE_CHECKING:
    import torch

    from mabert.ops.backend import Backend

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
FOR_TRAINING = ("accelerate", "datasets", "pyarrow", "scikit-learn", "tensorboard")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def env() -> None:
    """Show versions, devices and the backends of each op, with a self-test of every one.

    Exits with code 1 if a backend that should run here fails its self-test.

    Example: [bold]mabert env[/]
    """
    output.print(table("Versions", versions()), "", table("Machine", machine()), "")
    grid, remarks = backends()
    output.print(grid, *remarks)
    if any(remark.startswith("FAILED") for remark in remarks):
        raise typer.Exit(1)


def versions() -> Iterator[tuple[str, str]]:
    """Installed versions of this package and of what it stands on."""
    yield "python", platform.python_version()
    for name in ("mabert", *REQUIRED, *FOR_TRAINING):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed: pip install 'mabert[train]'"


def machine() -> Iterator[tuple[str, object]]:
    """Processor, memory and accelerators."""
    import torch

    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "cores", f"{os.cpu_count()}, {torch.get_num_threads()} threads for torch"
    yield "cpu flags", ", ".join(cpu_flags()) or "none known"
    yield "torch runs with", torch.backends.cpu.get_cpu_capability()
    if sys.platform != "win32":
        yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB, sm_{device.major}{device.minor}"
    if not torch.cuda.is_available():
        yield "cuda", "no device"


def cpu_flags() -> list[str]:
    """Those of CPU_FLAGS that the processor has (Linux; empty elsewhere)."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.exists() else set()
    return [flag for flag in CPU_FLAGS if flag in words]


def backends() -> tuple[Table, list[str]]:
    """A table of every backend of every op on every device, and what has to be said of those that do not run."""
    import torch

    from mabert.ops.backend import BACKENDS, OPS

    grid = Table(title="Backends", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("op", "device", "backend", "self-test"):
        grid.add_column(heading)
    grid.add_column("about", overflow="fold")
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    remarks: dict[str, None] = {}
    for op in OPS:
        for device in devices:
            for backend in BACKENDS:
                result, remark = outcome(op, device, backend)
                grid.add_row(op, str(device), backend.name, result, backend.about)
                if remark:
                    remarks[f"{result} {backend.name} on {device}: {remark}"] = None
    return grid, [escape(remark) for remark in remarks]


def outcome(op: str, device: "torch.device", backend: "Backend") -> tuple[str, str]:
    """`ok`, `missing`, `not tried` or `FAILED`, and the reason for all but the first."""
    if reason := backend.missing(device):
        return "missing", reason
    if backend.devices and not backend.automatic(device):
        return "not tried", f"it is for {' and '.join(backend.devices)}, and slow elsewhere."
    chatter = logging.getLogger("mabert.ops")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # which backend runs is what the table says
    try:
        error = largest_error(op, device, backend.name)
    except Exception as failure:  # a diagnosis goes on past what it finds broken
        return "FAILED", f"{op}: {type(failure).__name__}: {failure}"
    finally:
        chatter.setLevel(level)
    if not error < 1e-4:
        return "FAILED", f"{op}: error {error:.0e} against the reference in float64"
    return f"ok, error {error:.0e}", ""


def largest_error(op: str, device: "torch.device", backend: str) -> float:
    """The largest absolute error of output and gradients of one op on unit-scale input, fp32 against the reference in
    float64: two packed sequences, the models' state size, and channels that fill some vectors and one only in part."""
    import torch
    from torch import Tensor

    from mabert.ops import depthwise_conv, selective_scan

    def scan(leaves: list[Tensor], cu_seqlens: Tensor, backend: str) -> Tensor:
        x, delta, A, B, C, D, z, bias = leaves
        y = selective_scan(x, delta, -A.exp(), B, C, D, z, delta_bias=bias, cu_seqlens=cu_seqlens, backend=backend)
        assert isinstance(y, Tensor)
        return y

    def convolution(leaves: list[Tensor], cu_seqlens: Tensor, backend: str) -> Tensor:
        return depthwise_conv(*leaves, activation="silu", cu_seqlens=cu_seqlens, backend=backend)

    length, inner, state = 37, 149, 16
    x_BLE, B_BLN = (1, length, inner), (1, length, state)
    run, shapes = {
        "selective_scan": (scan, (x_BLE, x_BLE, (inner, state), B_BLN, B_BLN, (inner,), x_BLE, (inner,))),
        "depthwise_conv": (convolution, (x_BLE, (inner, 4), (inner,))),
    }[op]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    cu_seqlens = torch.tensor([0, 17, length], dtype=torch.int32)

    def results(dtype: torch.dtype, device: torch.device, backend: str) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        y = run(leaves, cu_seqlens.to(device), backend)
        return [result.detach().cpu().double() for result in (y, *torch.autograd.grad(y.square().mean(), leaves))]

    expected = results(torch.float64, torch.device("cpu"), "reference")
    found = results(torch.float32, device, backend)
    return max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
