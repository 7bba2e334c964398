"""Which implementation of an op runs: the best one for the device, or the one asked for.

An implementation is a module `mabert.ops.<op>.<backend>`. Nothing falls back silently: the backend in use is reported
once at INFO level, a slow one says what it costs, and asking for one that is missing raises.
"""

import logging
from dataclasses import dataclass
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

OPS = ("selective_scan", "depthwise_conv")


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    Attributes:
        name: what `use_backend` and the `backend=` argument take.
        about: what it is, in a few words.
        automatic: whether it may be chosen without being asked for.
        cost: what using it costs, said when it is chosen automatically; empty for the fast ones.
    """

    name: str
    about: str
    automatic: bool
    cost: str = ""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on the device, or None when it can."""
        return None


BACKENDS = (
    Backend(
        "torch",
        "plain PyTorch, chunked over time, backward written by hand",
        automatic=True,
        cost="no compiled kernel is used, so M layers take several times longer",
    ),
    Backend("reference", "the specification: a readable loop over time", automatic=False),
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


def choose_backend(op: str, device: torch.device, requested: str | None = None) -> str:
    """Name of the backend that runs `op` on `device`: the requested one, else `use_backend`'s, else the best available.

    Raises:
        ValueError: the requested name is unknown.
        RuntimeError: the requested backend cannot run on this device.
    """
    name = requested or _requested
    if name is not None:
        reason = _by_name(name).missing(device)
        if reason:
            raise RuntimeError(f"Backend {name!r} cannot run {op} on {device}: {reason}")
        return name
    backend = next(b for b in BACKENDS if b.automatic and b.missing(device) is None)
    if not torch.compiler.is_compiling():
        _report(op, device, backend)
    return backend.name


def _by_name(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"Unknown backend {name!r}. There are: {', '.join(b.name for b in BACKENDS)}.")


def _report(op: str, device: torch.device, backend: Backend) -> None:
    key = (op, device.type, backend.name)
    if key not in _reported:
        _reported.add(key)
        cost = f" ({backend.cost})" if backend.cost else ""
        logger.info("%s on %s runs with the %r backend: %s%s", op, device.type, backend.name, backend.about, cost)
