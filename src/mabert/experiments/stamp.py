"""What a number comes from: hardware, versions, commit."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mabert.ops import native
from mabert.training.runs import processor_name, versions

SOURCES = Path(__file__).resolve().parent.parent


def stamp() -> dict[str, Any]:
    """Hardware, versions and commit, for the file that a number is kept in.

    The commit is that of the source tree the package runs from; MABERT_COMMIT names it where git cannot. An installed
    package has none (None), in whatever repository it is installed: its version says which it is.
    """
    named = os.environ.get("MABERT_COMMIT")
    is_source = _git("ls-files", "--error-unmatch", __file__) is not None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": named or (_git("rev-parse", "HEAD") if is_source else None),
        "uncommitted_changes": not named and is_source and bool(_git("status", "--porcelain", "--", ".")),
        "hardware": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": native.kernels.isa() if native.kernels else "none",
            "memory_gib": _memory_gib(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(),
    }


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=SOURCES, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
