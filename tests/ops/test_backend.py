import logging
from importlib import import_module

import pytest
import torch

from mabert.ops import selective_scan, use_backend
from mabert.ops.backend import choose_backend

CPU, CUDA, F32 = torch.device("cpu"), torch.device("cuda"), torch.float32


@pytest.fixture(autouse=True)
def without_native(monkeypatch):
    monkeypatch.setattr("mabert.ops.native.kernels", None)
    monkeypatch.setattr("mabert.ops.native.missing_because", "no compiler")


def test_automatic_choice_is_reported_once_with_its_cost(caplog, monkeypatch):
    monkeypatch.setattr("mabert.ops.backend._reported", set())
    with caplog.at_level(logging.INFO, logger="mabert"):
        assert choose_backend("selective_scan", CPU, F32) == "torch"
        choose_backend("selective_scan", CPU, F32)
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert "'torch' backend" in caplog.text
    assert "many times as long as with a compiled kernel" in caplog.text
    assert "'native' backend is not used: it was not compiled (no compiler). Install a C++ compiler" in caplog.text


def test_a_backend_that_was_asked_for_is_reported_too(caplog, monkeypatch):
    monkeypatch.setattr("mabert.ops.backend._reported", set())
    monkeypatch.setattr("mabert.ops.native.kernels", object())
    with caplog.at_level(logging.INFO, logger="mabert"), use_backend("torch"):
        choose_backend("selective_scan", CPU, F32)
        choose_backend("selective_scan", CPU, F32)
    (record,) = caplog.records  # and what it costs is not said: a better one is there, and was not wanted
    assert record.levelname == "INFO"
    assert "'torch' backend" in record.getMessage()


def test_a_scan_compiled_from_its_first_call_says_what_is_missing(caplog, monkeypatch):
    monkeypatch.setattr("mabert.ops.backend._reported", set())
    compiled = torch.compile(lambda x, A: selective_scan(x, x, A, x, x), backend="eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger="mabert"):
        compiled(torch.zeros(1, 2, 3), torch.zeros(3, 3))
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]


def test_the_compiled_kernel_comes_first_where_it_can_run(caplog, monkeypatch):
    monkeypatch.setattr("mabert.ops.backend._reported", set())
    monkeypatch.setattr("mabert.ops.native.kernels", object())
    monkeypatch.setattr("mabert.ops.gpu.INSTALLED", True)
    with caplog.at_level(logging.WARNING, logger="mabert"):
        assert choose_backend("selective_scan", CPU, F32) == "native"
        assert choose_backend("selective_scan", CPU, torch.bfloat16) == "native"
        assert choose_backend("selective_scan", CUDA, torch.bfloat16) == "triton"
        assert not caplog.records
        assert choose_backend("selective_scan", CPU, torch.float64) == "torch"
        assert choose_backend("selective_scan", CUDA, torch.float64) == "torch"
    assert "not torch.float64" in caplog.records[0].getMessage()
    assert "'triton' backend is not used: it takes" in caplog.records[1].getMessage()


def test_a_gpu_without_triton_says_how_to_get_it(caplog, monkeypatch):
    monkeypatch.setattr("mabert.ops.backend._reported", set())
    monkeypatch.setattr("mabert.ops.gpu.INSTALLED", False)
    with caplog.at_level(logging.WARNING, logger="mabert"):
        assert choose_backend("selective_scan", CUDA, F32) == "torch"
    assert "Triton is not installed: pip install triton" in caplog.text


def test_triton_runs_on_a_cpu_in_its_interpreter_only_and_only_when_asked(monkeypatch):
    monkeypatch.setattr("mabert.ops.gpu.INSTALLED", True)
    monkeypatch.setattr("mabert.ops.gpu.INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"it runs on GPUs, not on cpu \(TRITON_INTERPRET=1"):
        choose_backend("selective_scan", CPU, F32, "triton")
    monkeypatch.setattr("mabert.ops.gpu.INTERPRETED", True)
    assert choose_backend("selective_scan", CPU, F32, "triton") == "triton"
    assert choose_backend("selective_scan", CPU, F32) == "torch"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (CPU, F32, r"Backend 'native' cannot run selective_scan: it was not compiled \(no compiler\)"),
        (CPU, torch.float64, "it takes torch.float32, torch.bfloat16, not torch.float64"),
        (torch.device("cuda"), F32, "it runs on CPUs, not on cuda"),
    ],
)
def test_a_missing_explicit_backend_raises(device, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        choose_backend("selective_scan", device, dtype, "native")


def test_use_backend_holds_for_a_block_or_until_the_next_call():
    with use_backend("reference"):
        assert choose_backend("selective_scan", CPU, F32) == "reference"
        assert choose_backend("selective_scan", CPU, F32, "torch") == "torch"
    assert choose_backend("selective_scan", CPU, F32) == "torch"
    use_backend("reference")
    assert choose_backend("selective_scan", CPU, F32) == "reference"
    use_backend(None)
    assert choose_backend("selective_scan", CPU, F32) == "torch"


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch):
    reference = import_module("mabert.ops.selective_scan.reference")
    monkeypatch.setattr(reference, "selective_scan", lambda *a: ("reference ran", None))
    x = torch.zeros(1, 2, 3)
    with use_backend("reference"):
        assert selective_scan(x, x, torch.zeros(3, 1), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)) == "reference ran"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        use_backend("fast")
