"""Run one measurement in a process of its own, under a limit of memory and of time (Linux).

Nothing that ran before can help or hinder it, and one that runs out of memory takes nothing else with it. The process
is forked from one that has imported the module and has done nothing else, so that a start takes no seconds.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

WATCH_SECONDS = 0.05
SHARE_OF_MEMORY = 0.9
STATUS, CGROUP, VMSTAT = Path("/proc/self/status"), Path("/sys/fs/cgroup"), Path("/proc/vmstat")
STARTER = multiprocessing.get_context("forkserver")


def in_fresh_process(
    module: str, request: Mapping[str, Any], *, seconds: float, memory_bytes: int | None = None
) -> dict[str, Any]:
    """What `module.main()` answers to a request: it reads it from the command line as JSON, and the last line that it
    prints is the answer, JSON as well.

    Args:
        seconds: it is ended after so long, its start included.
        memory_bytes: it is ended when more than that is resident; by default nine tenths of what is free now.

    Returns:
        The answer, or `{"out_of_memory": True}` or `{"over_time": True}` where the process had to be ended, by this
        one or by the system; in every case with the limits and the machine's load before the start, unless the answer
        has words of its own for them.

    Raises:
        RuntimeError: the process failed in any other way; the message ends with what it wrote about that.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"memory is watched through Linux's /proc, which {sys.platform} does not have.")
    limit = memory_bytes or int(SHARE_OF_MEMORY * available_bytes())
    around = {
        "memory_limit_bytes": limit,
        "time_limit_seconds": seconds,
        "load_average_before": os.getloadavg()[0],
    }
    text = json.dumps(request)
    STARTER.set_forkserver_preload([__name__, module])  # heard by the first call only, which starts the one that forks
    killed_before = _killed_for_memory()
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = STARTER.Process(target=_answer, args=(module, text, output, errors))
        process.start()
        try:
            verdict = _watch(process, limit, seconds)
        finally:
            if process.is_alive():
                _end(process)
        if process.exitcode == -signal.SIGKILL and _killed_for_memory() > killed_before:
            verdict = verdict or "out_of_memory"
        if verdict:
            return around | {verdict: True}
        if process.exitcode:
            why = _how_it_ended(process.exitcode)
            raise RuntimeError(f"{module} {text}\n{why}:\n{errors.read_text() if errors.exists() else ''}")
        return around | json.loads(output.read_text().splitlines()[-1])


def _answer(module: str, request: str, output: Path, errors: Path) -> None:
    """What the process does: as `python -m module request` in a session of its own, so that what it starts (compilers)
    can be ended with it.
    """
    os.setsid()
    for file, descriptor in ((os.devnull, 0), (output, 1), (errors, 2)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
    sys.argv = [module, request]
    importlib.import_module(module).main()


def _watch(process: ForkServerProcess, limit: int, seconds: float) -> str | None:
    """Wait for its end, or for the moment when it has to be ended."""
    end = time.monotonic() + seconds
    while process.is_alive():
        if _resident_bytes(process.pid) > limit:
            return "out_of_memory"
        if time.monotonic() > end:
            return "over_time"
        time.sleep(WATCH_SECONDS)
    return None


def _end(process: ForkServerProcess) -> None:
    """With all that it started."""
    assert process.pid is not None  # it has been started
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no session of its own yet
        process.kill()
    process.join()


def _killed_for_memory() -> int:
    """How many processes the system has killed because it had no memory left; 0 where it does not count them."""
    counts = VMSTAT.read_text().splitlines() if VMSTAT.exists() else []
    return sum(int(line.split()[1]) for line in counts if line.startswith("oom_kill "))


def _how_it_ended(code: int) -> str:
    return f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"


def _resident_bytes(process: int | None) -> int:
    """Of another process; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def restart_peak() -> int:
    """Let the high-water mark of this process's resident memory begin anew; returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _field(STATUS, "VmRSS:") * 1024


def peak_resident_bytes() -> int:
    """The most that was resident in this process at once since `restart_peak`."""
    return _field(STATUS, "VmHWM:") * 1024


def available_bytes() -> int:
    """Memory that a new process could use: of the machine, or of the container where that has less."""
    available = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - _field(CGROUP / "memory.stat", "anon "))
    return available


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {name}")
