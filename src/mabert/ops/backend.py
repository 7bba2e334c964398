"""Which implementation of an op runs: the best one for the device, or the one asked for.

Nothing falls back silently: the backend in use is reported once at INFO level, one that is slower than another could be
says at WARNING level what it costs and how to get the other, and asking for one that is missing raises.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

from mabert.ops import gpu, native

logger = logging.getLogger(__name__)

OPS = ("selective_scan", "depthwise_conv")


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: what `use_backend` and the `backend=` argument take.
        about: what it is, in a few words.
        missing: why it cannot run on a device, or None when it can.
        dtypes: the dtypes it takes.
        devices: the kinds of devices on which it is chosen without being asked for; None for all.
        cost: what using it instead of a better one costs, said where no better one can run.
    """

    name: str
    about: str
    missing: Callable[[torch.device], str | None]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None
    cost: str = ""

    def automatic(self, device: torch.device) -> bool:
        """Whether it is chosen on this device without being asked for, where it can run."""
        return self.devices is None or device.type in self.devices

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run on this device with this dtype, or None when it can."""
        if dtype not in self.dtypes:
            return f"it takes {', '.join(str(d) for d in self.dtypes)}, not {dtype}."
        return self.missing(device)


def _native_missing(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}."
    if native.kernels is None:
        return (
            f"it was not compiled ({native.missing_because}). Install a C++ compiler (GCC or Clang), then reinstall: "
            "pip install --force-reinstall --no-deps mabert, or from a checkout: pip install -e ."
        )
    return None


def _everywhere(device: torch.device) -> str | None:
    return None


_MORE_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The best one first.
BACKENDS = (
    Backend("native", "compiled CPU kernels", _native_missing, native.DTYPES, ("cpu",)),
    Backend("triton", "Triton kernels, compiled when first used", gpu.missing, gpu.DTYPES, ("cuda",)),
    Backend(
        "torch",
        "plain PyTorch, chunked over time",
        _everywhere,
        _MORE_FLOATS,
        None,
        cost="the selective scan takes many times as long as with a compiled kernel (on a CPU: docs/results.md)",
    ),
    Backend("reference", "the specification: a loop over time", _everywhere, _MORE_FLOATS, ()),
)

_requested: str | None = None
_reported: set[tuple[str, str, str]] = set()


class use_backend:  # noqa: N801  (reads as a statement: `with use_backend("reference"):`)
    """Run every op with the named backend from now on, or within a `with` block; None goes back to automatic.

    Raises:
        ValueError: no backend has this name.
    """

    def __init__(self, name: str | None):
        global _requested
        if name is not None:
            _by_name(name)
        self._previous, _requested = _requested, name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def choose_backend(op: str, device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """Name of the backend that runs `op`: the requested one, else `use_backend`'s, else the best one that can.

    Raises:
        ValueError: the requested name is unknown.
        RuntimeError: the requested backend cannot run on this device or with this dtype.
    """
    name = requested or _requested
    if name is not None:
        reason = _by_name(name).refuses(device, dtype)
        if reason:
            raise RuntimeError(f"Backend {name!r} cannot run {op}: {reason}")
    else:
        name = next((b.name for b in BACKENDS if b.automatic(device) and b.refuses(device, dtype) is None), None)
        if name is None:
            raise RuntimeError(f"No backend runs {op} on {device} with {dtype}.")
    if not torch.compiler.is_compiling():
        report_backend(op, device, dtype, name)
    return name


def report_backend(op: str, device: torch.device, dtype: torch.dtype, name: str) -> None:
    """Say once which backend runs an op, and once what it costs where no better one can run.

    `choose_backend` does that by itself, except under torch.compile, where an op's own code has to.
    """
    backend = _by_name(name)
    key = (op, device.type, name)
    if key in _reported:
        return
    _reported.add(key)
    logger.info("%s on %s runs with the %r backend: %s", op, device.type, name, backend.about)
    better = [other for other in BACKENDS[: BACKENDS.index(backend)] if other.automatic(device)]
    reasons = [(other.name, other.refuses(device, dtype)) for other in better]
    if backend.cost and all(reason for _, reason in reasons):
        said = " ".join(f"The {other!r} backend is not used: {reason}" for other, reason in reasons)
        logger.warning("%s on %s: %s. %s", op, device.type, backend.cost, said)


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"Unknown backend {name!r}. There are: {', '.join(b.name for b in BACKENDS)}.")
