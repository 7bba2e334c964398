"""Figure 5 with Tables B5 to B7: which cells there are, a real one from start to end, and the numbers of the paper."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mabert.experiments import fresh_process
from mabert.experiments.architectures import BASELINES
from mabert.experiments.cells import CellStore, matching, run_cells
from mabert.experiments.efficiency import (
    KINDS,
    MODELS,
    Headline,
    efficiency_cells,
    hardware,
    headline,
    parameter_table,
    protocols,
)
from mabert.experiments.published import published
from mabert.experiments.scales import base, cpu, tiny
from mabert.ops import native, use_backend
from mabert.training.runs import processor_name

QUIET = Console(quiet=True)


def cells_of(scale, *names):
    return {cell.name: cell for cell in efficiency_cells(scale, names)}


def test_every_model_length_precision_and_kind_is_a_cell_that_runs_alone():
    cells = cells_of(replace(tiny(), efficiency_training_lengths=(128,)), "cpu")
    assert len(cells) == 8 * 2 * (2 + 1)
    assert "efficiency/cpu/fp32/inference/MaBERT/512" in cells
    assert "efficiency/cpu/bf16/training/BigBird/128" in cells
    assert "efficiency/cpu/bf16/training/BigBird/512" not in cells
    for cell in cells.values():
        assert cell.alone
        assert json.loads(json.dumps(cell.config)) == {
            **cell.config,
            "size": json.loads(json.dumps(cell.config["size"])),
        }


def test_base_models_are_timed_at_every_scale_but_the_smallest():
    assert cells_of(cpu(), "cpu")["efficiency/cpu/fp32/training/BERT/2048"].config["size"]["hidden_size"] == 768
    assert cells_of(tiny(), "cpu")["efficiency/cpu/fp32/training/BERT/512"].config["size"]["hidden_size"] == 64


def test_the_papers_protocol():
    cells = cells_of(base(), "paper")
    inference = cells["efficiency/paper/bf16/inference/MaBERT/4096"].config
    training = cells["efficiency/paper/bf16/training/MaBERT/4096"].config
    for config in (inference, training):
        assert (config["warm_up"], config["repetitions"], config["device"]) == (20, 100, "cuda")
        assert (config["bf16"], config["compiled"], config["mixed_lengths"]) == (True, False, False)
        assert config["execution"] == "padded"
        assert set(config["sdpa_kernels"]) == {"MATH", "EFFICIENT_ATTENTION"}
    assert (inference["rows"], training["rows"]) == (1, 32)


def test_best_of_each():
    config = cells_of(base(), "best")["efficiency/best/bf16/inference/BERT/4096"].config
    assert (config["compiled"], config["mixed_lengths"], config["sdpa_kernels"]) == (True, True, None)
    assert config["execution"] == "packed"


def test_on_a_cpu_five_repetitions_at_most():
    config = cells_of(base(), "cpu")["efficiency/cpu/fp32/inference/BERT/4096"].config
    assert (config["warm_up"], config["repetitions"], config["seconds"], config["rows"]) == (1, 5, 120.0, 1)


def test_a_gpu_decides_what_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert protocols() == ("cpu",)
    assert all(cell.name.startswith("efficiency/cpu/") for cell in efficiency_cells(tiny()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert protocols() == ("paper", "best")


@pytest.mark.skipif(fresh_process.sys.platform != "linux", reason="memory is watched through Linux's /proc")
def test_a_cell_runs_in_a_process_of_its_own_and_is_not_run_again(tmp_path, monkeypatch):
    store = CellStore(tmp_path / "results", tmp_path / "work")
    name = "efficiency/cpu/bf16/training/MaBERT/128"
    cells = efficiency_cells(tiny(), ("cpu",))
    started = []
    start = fresh_process.ForkServerProcess.start

    def counted(process):
        started.append(process)
        start(process)

    monkeypatch.setattr(fresh_process.ForkServerProcess, "start", counted)
    for _ in range(2):
        run_cells(matching(cells, [name]), store, console=QUIET)
        assert len(started) == 1
    content = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    result = content["result"]
    assert result["median_ms"] > 0
    assert result["tokens"] == 128
    assert result["extra_resident_bytes"] > 3 * 4 * result["parameters"]  # gradients, and Adam's two moments
    assert result["memory_limit_bytes"] > result["peak_resident_bytes"] > 2**27
    assert content["config"]["size"]["hidden_size"] == 64


def test_the_headlines_are_the_papers():
    expected = {"tableB6_train_step_ms_effective_batch32": 2.356, "tableB7_inference_ms_batch1": 2.434}
    for table, ratio in expected.items():
        rows = published()[table]
        times = {int(length): {model: rows[model][length] for model in rows} for length in rows["MaBERT"]}
        found = headline(times)
        assert found is not None
        assert found.length == 4096
        assert round(found.ratio, 3) == ratio


def test_a_headline_needs_all_six():
    row = dict.fromkeys(("MaBERT", *BASELINES), 6.0) | {"MaBERT": 2.0, "BERT": 16.0, "ModernBERT": 99.0}
    assert headline({128: row, 512: row | {"DeBERTa": None}}) == Headline(128, 8.0, 2.0)
    assert headline({128: row}).ratio == 4.0
    del row["ALBERT"]
    assert headline({128: row}) is None
    assert headline({}) is None


def test_parameters_are_the_published_ones():
    table = parameter_table()
    assert list(table) == list(MODELS)
    for model in ("BERT", "ALBERT", "Longformer", "BigBird"):
        assert round(table[model]["millions"], 3) == table[model]["published"]
    assert table["DeBERTa"]["millions"] == pytest.approx(table["DeBERTa"]["published"], rel=1e-3)
    # the paper's count fits no configuration that it describes
    assert round(table["MaBERT"]["millions"], 1) == 120.2
    assert table["MaBERT"]["published"] == 205.322
    assert table["ModernBERT"]["published"] is None


def test_times_of_another_machine_are_other_cells(monkeypatch):
    name = "efficiency/cpu/fp32/inference/BERT/128"
    here = cells_of(tiny(), "cpu")[name].config
    monkeypatch.setattr("mabert.experiments.efficiency.hardware", lambda: "another card")
    elsewhere = cells_of(tiny(), "cpu")[name].config
    assert elsewhere == here | {"hardware": "another card"} != here


def test_a_measured_process_has_the_threads_that_its_cell_tells_of(tmp_path):
    """Also where this process was given another number than a fresh one takes."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cell = cells_of(tiny(), "cpu")["efficiency/cpu/fp32/inference/BERT/128"]
            assert cell.config["threads"] == cell.run()["threads"] == threads
    finally:
        torch.set_num_threads(before)
    paper = next(iter(cells_of(tiny(), "paper").values()))
    assert paper.config["threads"] is None


def test_processors_of_one_name_are_told_apart_by_their_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = []
    for instructions in ("AVX2", "AVX512"):
        hardware.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=instructions: name)
        names.append(hardware())
        hardware.cache_clear()
    with use_backend("torch"):
        slow = hardware()
    hardware.cache_clear()
    kernels = "" if native.kernels else ", without kernels"
    assert names == [f"{processor_name()}, avx2{kernels}", f"{processor_name()}, avx512{kernels}"]
    assert slow == f"{processor_name()}, avx512, without kernels"


def test_training_steps_on_a_cpu_end_at_2048_tokens():
    cells = {name: cells_of(base(), name).values() for name in ("cpu", "paper")}
    longest = {
        (name, kind): max(cell.config["length"] for cell in found if f"/{kind}/" in cell.name)
        for name, found in cells.items()
        for kind in KINDS
    }
    assert longest[("cpu", "training")] == 2048
    assert set(longest.values()) == {2048, 4096}
    assert longest[("cpu", "inference")] == longest[("paper", "training")] == 4096
