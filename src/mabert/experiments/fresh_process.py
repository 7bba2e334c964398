"""Run one measurement in a process of its own, under a limit of memory and of time (Linux).

Nothing that ran before can help or hinder it, and one that runs out of memory takes nothing else with it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

WATCH_SECONDS = 0.05
SHARE_OF_MEMORY = 0.9
STATUS, CGROUP = Path("/proc/self/status"), Path("/sys/fs/cgroup")


def in_fresh_process(
    module: str, request: Mapping[str, Any], *, seconds: float, memory_bytes: int | None = None
) -> dict[str, Any]:
    """What `python -m module` answers to a request: both are JSON, the answer is the last line that it prints.

    Args:
        seconds: it is ended after so long, its start included.
        memory_bytes: it is ended when more than that is resident; by default nine tenths of what is free now.

    Returns:
        The answer, or `{"out_of_memory": True}` or `{"over_time": True}` where the process had to be ended; in every
        case with the limits and the machine's load before the start, unless the answer has words of its own for them.

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
    command = [sys.executable, "-m", module, json.dumps(request)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        # A session of its own, so that what it starts (compilers) can be ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            verdict = _watch(process, limit, seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if verdict:
            return around | {verdict: True}
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{_how_it_ended(process.returncode)}:\n{_text(errors)}")
        return around | json.loads(_text(output).splitlines()[-1])


def _watch(process: subprocess.Popen, limit: int, seconds: float) -> str | None:
    """Wait for its end, or for the moment when it has to be ended."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if _resident_bytes(process.pid) > limit:
            return "out_of_memory"
        if time.monotonic() > end:
            return "over_time"
        time.sleep(WATCH_SECONDS)
    return None


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, probably by the system for want of memory: give it a lower limit"
    return f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _resident_bytes(process: int) -> int:
    """Of another process that has not been waited for; 0 once it has ended."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
