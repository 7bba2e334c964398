"""A process of its own: its answer, its limits, and what happens to what goes wrong in it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mabert.experiments import fresh_process
from mabert.experiments.fresh_process import available_bytes, in_fresh_process, peak_resident_bytes, restart_peak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is watched through Linux's /proc")

MODULE = """
import json, os, subprocess, sys, time


def main():
    request = json.loads(sys.argv[1])
    print("this line is not the answer")
    if "bytes" in request:
        kept = []
        while len(kept) * 2**22 < request["bytes"]:
            kept.append(bytearray(b"1") * 2**22)
    if "sleep" in request:
        child = subprocess.Popen(["sleep", str(request["sleep"])])
        open(request["pids"], "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(request["sleep"])
    if "raise" in request:
        raise RuntimeError(request["raise"])
    if "signal" in request:
        os.kill(os.getpid(), request["signal"])
    print(json.dumps(request["answer"]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def run(request, *, seconds=20.0, **limits):
        return in_fresh_process("planted_module", {"answer": {}} | request, seconds=seconds, **limits)

    return run


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", str(process)], capture_output=True, text=True, check=False).stdout
    return not state.startswith("Z")


def test_the_last_line_is_the_answer_and_the_circumstances_stand_beside_it(run):
    answer = run({"answer": {"median_ms": 1.5}}, memory_bytes=2**30)
    assert answer.pop("load_average_before") >= 0
    assert answer == {"median_ms": 1.5, "memory_limit_bytes": 2**30, "time_limit_seconds": 20.0}


def test_an_answer_may_name_another_limit(run):
    assert run({"answer": {"memory_limit_bytes": 7}})["memory_limit_bytes"] == 7


def test_a_planted_allocation_is_out_of_memory_above_the_limit_only(run):
    request = {"bytes": 600 * 2**20, "sleep": 0.3, "pids": os.devnull, "answer": {"fits": True}}
    assert run(request, memory_bytes=1500 * 2**20)["fits"]
    answer = run(request | {"sleep": 20}, memory_bytes=500 * 2**20)
    assert answer["out_of_memory"]
    assert answer["memory_limit_bytes"] == 500 * 2**20
    assert "fits" not in answer


def test_what_takes_too_long_is_ended_with_all_that_it_started(run, tmp_path):
    pids = tmp_path / "pids"
    began = time.monotonic()
    answer = run({"sleep": 60, "pids": str(pids)}, seconds=1.0)
    assert time.monotonic() - began < 10
    assert answer["over_time"]
    assert answer["time_limit_seconds"] == 1.0
    assert not any(is_running(int(process)) for process in pids.read_text().split())


def test_a_signal_to_the_parent_ends_the_process(run, tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def interrupt(seconds):
        if pids.exists() and pids.read_text().count(" "):
            raise KeyboardInterrupt

    monkeypatch.setattr(fresh_process.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run({"sleep": 60, "pids": str(pids)})
    assert not any(is_running(int(process)) for process in pids.read_text().split())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"raise": "a planted mistake"}, "(?s)failed with exit status 1.*a planted mistake"),
        ({"signal": signal.SIGABRT}, "ended with SIGABRT"),
        ({"signal": signal.SIGKILL}, "ended with SIGKILL"),
    ],
)
def test_any_other_failure_raises_and_says_what_it_wrote(run, request_, message):
    with pytest.raises(RuntimeError, match=message):
        run(request_)


def test_a_process_that_the_system_killed_for_want_of_memory_was_out_of_memory(run, monkeypatch):
    killed = iter([3, 4])
    monkeypatch.setattr(fresh_process, "_killed_for_memory", lambda: next(killed))
    assert run({"signal": signal.SIGKILL})["out_of_memory"]


def test_a_system_that_counts_no_kills_tells_of_the_signal(run, tmp_path, monkeypatch):
    for content in (None, "nr_free_pages 7\n"):
        monkeypatch.setattr(fresh_process, "VMSTAT", tmp_path / "vmstat")
        if content:
            (tmp_path / "vmstat").write_text(content)
        with pytest.raises(RuntimeError, match="ended with SIGKILL"):
            run({"signal": signal.SIGKILL})


def test_another_system_is_told_so(run, monkeypatch):
    monkeypatch.setattr(fresh_process.sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="darwin does not have"):
        run({})


def test_memory_is_limited_by_the_machine_or_by_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh_process, "CGROUP", tmp_path)
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < available_bytes() <= everything
    (tmp_path / "memory.stat").write_text("file 5000000\nanon 1000000\n")
    (tmp_path / "memory.max").write_text("9000000\n")
    assert available_bytes() == 8_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 8_000_000


def test_the_peak_begins_anew():
    planted = 2**28
    bytearray(b"1") * planted
    assert peak_resident_bytes() - restart_peak() >= 0.9 * planted
    assert peak_resident_bytes() - restart_peak() < 0.1 * planted
