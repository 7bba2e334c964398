import logging
from importlib import import_module

import pytest
import torch

from mabert.ops import selective_scan, use_backend
from mabert.ops.backend import choose_backend

CPU = torch.device("cpu")


def test_automatic_choice_is_reported_once_with_its_cost(caplog, monkeypatch):
    monkeypatch.setattr("mabert.ops.backend._reported", set())
    with caplog.at_level(logging.INFO, logger="mabert"):
        assert choose_backend("selective_scan", CPU) == "torch"
        choose_backend("selective_scan", CPU)
    assert len(caplog.records) == 1
    assert "'torch' backend" in caplog.text
    assert "several times longer" in caplog.text


def test_use_backend_holds_for_a_block_or_until_the_next_call():
    with use_backend("reference"):
        assert choose_backend("selective_scan", CPU) == "reference"
        assert choose_backend("selective_scan", CPU, "torch") == "torch"
    assert choose_backend("selective_scan", CPU) == "torch"
    use_backend("reference")
    assert choose_backend("selective_scan", CPU) == "reference"
    use_backend(None)
    assert choose_backend("selective_scan", CPU) == "torch"


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch):
    reference = import_module("mabert.ops.selective_scan.reference")
    monkeypatch.setattr(reference, "selective_scan", lambda *a: ("reference ran", None))
    x = torch.zeros(1, 2, 3)
    with use_backend("reference"):
        assert selective_scan(x, x, torch.zeros(3, 1), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)) == "reference ran"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="Unknown backend 'fast'"):
        use_backend("fast")
