import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

# Hub look-ups retry for half a minute before they fail; nothing here may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On tensors this small a second thread only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, Triton's kernels run in its interpreter; it has to know before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_searched_for_garbage() -> None:
    """The Trainer collects garbage whenever it starts: most of a second with torch and transformers on the heap."""
    gc.collect()
    gc.freeze()


MEASURED = """
from pathlib import Path

def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":"))) * 1024

def measured(run):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    print(_status("VmHWM") - before)
"""


@pytest.fixture
def peak_memory_of() -> Callable[[str], int]:
    """Runs code in a process of its own, where no freed memory waits to be used again, and gives by how many bytes the
    resident memory grew at its highest while `measured(function)`, to be called once in the code, ran."""

    def peak(code: str) -> int:
        # left to itself, glibc keeps some freed blocks of megabytes, now more and now fewer
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        command = [sys.executable, "-c", MEASURED + textwrap.dedent(code)]
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert process.returncode == 0, process.stderr
        return int(process.stdout.split()[-1])

    return peak
