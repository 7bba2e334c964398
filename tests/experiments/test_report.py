import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from invented_results import STAMP, everything, finetuned, pretrained, pretraining_config, put
from rich.console import Console

import screenshot_report
from mabert.experiments.efficiency import efficiency_cell, efficiency_cells
from mabert.experiments.recall import Recall
from mabert.experiments.report import plots, write_report
from mabert.experiments.report.collect import Record
from mabert.experiments.report.plots import Series
from mabert.experiments.report.pretraining import tokens_at
from mabert.experiments.scales import tiny
from mabert.experiments.transpoints import timing_cells

VOID = {"meta", "link"}


class Page(HTMLParser):
    """A page taken apart: what is in each table, and whether every element is closed."""

    def __init__(self, path: Path, results: Path) -> None:
        super().__init__()
        self.results = results
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.figures: list[dict] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._take(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._take(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "figure" not in self.open:
            return
        figure = self.figures[-1]
        figure["text"] += data
        if "td" in self.open or "th" in self.open:
            figure["rows"][-1][-1] += (" " if "small" in self.open else "") + data
            if "b" in self.open:
                figure["bold"].append(data)

    def _take(self, tag: str, attrs: dict[str, str | None]) -> None:
        self.ids += [attrs["id"]] if attrs.get("id") else []
        if tag == "figure":
            self.figures.append({"text": "", "rows": [], "bold": []})
        elif tag == "tr" and "figure" in self.open:
            self.figures[-1]["rows"].append([])
        elif tag in ("td", "th") and "figure" in self.open:
            self.figures[-1]["rows"][-1].append("")
        loads = {"a": [], "use": []}.get(tag, [attrs.get(name) for name in ("src", "href", "data", "srcset")])
        self.loads += [value for value in loads if value]
        self.links += [attrs["href"]] if tag == "a" and attrs.get("href") else []

    def figure(self, title: str) -> dict:
        """The only table or plot whose caption begins so."""
        (found,) = (figure for figure in self.figures if figure["text"].startswith(title))
        return found

    def rows(self, title: str) -> dict[str, list[str]]:
        """Its lines; a published one is named so after the model above it."""
        rows, label = {}, ""
        for first, *others in self.figure(title)["rows"][1:]:
            label = f"{label}, published" if first == "published" else first
            rows[label] = others
        return rows


def report(results: Path) -> Page:
    return Page(write_report(results, results.parent / "page" / "report.html"), results)


def tuned(folder: Path, model: str, task: str, scores: list[float], metric: str, subset: str = "", **stamp) -> None:
    for seed, score in enumerate(scores):
        put(folder, f"finetuning/{model}/0/{task}/{seed}", finetuned({"dev": score}, subset, metric), **stamp)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def patterns(results: Path) -> Path:
    """Table 1 at scale tiny: two patterns, two tasks, two seeds."""
    folder = results / "tiny"
    for model, loss in (("MaBERT", 4.25), ("TTTTTTTTTTTT", 5.5)):
        config = pretraining_config(tiny(), model)
        put(folder, f"pretraining/{model}/0", pretrained(loss, config), config)
    tuned(folder, "MaBERT", "CoLA", [0.40, 0.44], "mcc")
    tuned(folder, "MaBERT", "RTE", [0.60, 0.52], "accuracy", "(subset, 64 rows)")
    tuned(folder, "TTTTTTTTTTTT", "CoLA", [0.10, 0.30], "mcc")
    tuned(folder, "TTTTTTTTTTTT", "RTE", [0.58, 0.56], "accuracy", "(subset, 64 rows)")
    return folder


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Page:
    results = tmp_path_factory.mktemp("invented") / "results"
    everything(results, "tiny")
    return report(results)


def test_means_and_sample_deviations_over_seeds_are_shown(patterns: Path) -> None:
    rows = report(patterns.parent).rows("Table 1")
    # (0.40, 0.44), (0.60, 0.52): by hand; the average is taken run by run, (0.50, 0.48)
    assert rows["MMTMMTMMTMMT"] == ["0.420 ±0.028", "0.560 ±0.057", "0.490 ±0.014", "4.224", "2.84"]
    assert rows["TTTTTTTTTTTT"][:3] == ["0.200 ±0.141", "0.570 ±0.014", "0.385 ±0.064"]
    assert rows["majority class"] == ["0.500", "0.500", "", "", ""]


def test_a_single_seed_has_no_deviation(results: Path) -> None:
    for model, score in (("MaBERT", 0.4), ("TTTTTTTTTTTT", 0.3)):
        tuned(results / "tiny", model, "CoLA", [score], "mcc")
    page = report(results)
    assert page.rows("Table 1")["MMTMMTMMTMMT"][0] == "0.400"
    assert "1 pretraining seed, 1 fine-tuning seed." in page.figure("Table 1")["text"]


def test_published_scores_stand_below_ours_and_are_called_so(patterns: Path) -> None:
    page = report(patterns.parent)
    rows = page.rows("Table 1")
    assert rows["MMTMMTMMTMMT, published"] == ["0.574 ±0.016", "0.602 ±0.030", "0.588", "", ""]
    assert rows["TTTTTTTTTTTT, published"][:2] == ["0.428 ±0.020", "0.575 ±0.030"]
    assert "MMMMMMMMMMMM" in rows, "a row of the scale that was not measured"
    assert rows["MMMMMMMMMMMM"] == ["–"] * 5
    assert "Published: after 10% of the paper's steps." in page.figure("Table 1")["text"]


def test_the_best_of_ours_and_of_the_published_is_bold(patterns: Path) -> None:
    bold = report(patterns.parent).figure("Table 1")["bold"]
    assert sorted(bold) == sorted(["0.420", "0.490", "4.224", "0.570", "0.574", "0.602", "0.588"])


def test_where_all_are_the_same_none_is_best(results: Path) -> None:
    for model in ("MaBERT", "TTTTTTTTTTTT"):
        tuned(results / "tiny", model, "CoLA", [0.0, 0.0], "mcc")
    assert "0.000" not in report(results).figure("Table 1")["bold"]


def test_a_missing_cell_is_counted_and_never_averaged_over(patterns: Path) -> None:
    (patterns / "finetuning/MaBERT/0/RTE/1.json").unlink()
    page = report(patterns.parent)
    row = page.rows("Table 1")["MMTMMTMMTMMT"]
    assert row[:3] == ["0.420 ±0.028", "– 1 of 2 cells", "–"]
    # 3 patterns with 1 pretraining and 4 fine-tuning cells; one pattern lacks all 5, MaBERT one
    assert "9 of 15 cells." in page.figure("Table 1")["text"]


def test_the_caption_says_scale_seeds_and_what_was_matched(patterns: Path) -> None:
    text = report(patterns.parent).figure("Table 1")["text"]
    assert "Scale tiny, small-scale: not comparable with published scores; 1 pretraining seed, 2 fine-tuning" in text
    assert "Matched: parameters outside the embeddings (by the width of the FFN), 51,000,000 tokens, text" in text


def test_what_was_not_matched_is_said(patterns: Path) -> None:
    config = pretraining_config(tiny(), "MaBERT") | {"batch_size": 99}
    put(patterns, "pretraining/MaBERT/0", pretrained(4.0, config) | {"tokens": 7}, config)
    text = report(patterns.parent).figure("Table 1")["text"]
    assert "Not matched: the tokens, 7 to 51,000,000; the choices in the configs." in text
    assert "recipe" not in text


def test_numbers_of_a_model_that_was_trained_again_are_told_apart(patterns: Path) -> None:
    config = pretraining_config(tiny(), "MaBERT")
    put(patterns, "pretraining/MaBERT/0", pretrained(4.0, config) | {"weights": "aa"}, config)
    run = finetuned({"dev": 0.4}, metric="mcc")
    put(patterns, "finetuning/MaBERT/0/CoLA/0", run | {"weights": "aa"})
    assert "Pretrained again" not in report(patterns.parent).text
    put(patterns, "finetuning/MaBERT/0/CoLA/1", run | {"weights": "bb"})
    text = report(patterns.parent).figure("Table 1")["text"]
    assert "Pretrained again since, by the same choices: MaBERT. Its numbers are of several models." in text


def test_other_budgets_than_the_scales_are_shown(results: Path) -> None:
    for model in ("MaBERT@20", "BERT@20", "TTTTTTTTTTTT@20"):
        tuned(results / "tiny", model, "CoLA", [0.4, 0.5], "mcc")
    page = report(results)
    assert page.rows("Table 1 · Order of the layers, 20%")["MMTMMTMMTMMT"][0] == "0.450 ±0.071"
    rows = page.rows("Pretraining budget · 20%")
    assert rows["BERT"][0] == "0.450 ±0.071"
    assert not any("published" in label for label in rows)


def test_two_pretraining_seeds_count_with_their_runs(patterns: Path) -> None:
    for seed, score in enumerate((0.50, 0.54)):
        put(patterns, f"finetuning/MaBERT/1/CoLA/{seed}", finetuned({"dev": score}, metric="mcc"))
    page = report(patterns.parent)
    assert page.rows("Table 1")["MMTMMTMMTMMT"][0] == "0.470 ±0.062"  # of 0.40, 0.44, 0.50, 0.54
    assert page.rows("Table 1")["MMTMMTMMTMMT"][1] == "– 2 of 4 cells"
    assert "1 to 2 pretraining seeds" in page.figure("Table 1")["text"]


def test_a_score_on_a_part_of_the_data_says_so(patterns: Path) -> None:
    head = report(patterns.parent).figure("Table 1")["rows"][0]
    assert head[1] == "CoLA Matthews corr."
    assert head[2] == "RTE accuracy (subset, 64 rows)"


def test_where_numbers_come_from_stands_below_them(patterns: Path) -> None:
    tuned(patterns, "MaBERT", "CoLA", [0.40, 0.44], "mcc", date="2026-03-04", commit="f" * 40, uncommitted_changes=True)
    text = report(patterns.parent).figure("Table 1")["text"]
    assert "Invented CPU (cores: 2, threads: 1, avx512, 23.5 GiB) · python 3.11.7, mabert 0.1.0" in text
    assert "commits 0123456, fffffff with uncommitted changes · 2026-01-02 to 2026-03-04." in text


def test_without_glue_tasks_nothing_published_stands_beside(results: Path) -> None:
    for model in ("MaBERT", "TTTTTTTTTTTT"):
        tuned(results / "tiny", model, "acceptability", [0.7, 0.8], "accuracy")
    page = report(results)
    assert page.rows("Table 1")["MMTMMTMMTMMT"][0] == "0.750 ±0.071"
    assert not any("published" in label for label in page.rows("Table 1"))
    assert "those of GLUE tasks, none of which was run here" in page.figure("Table 1")["text"]


def test_paired_differences_are_bold_where_the_interval_excludes_zero(patterns: Path) -> None:
    split = {"metric": "mcc", "difference": 0.22, "low": 0.01, "high": 0.4, "confidence": 0.95, "rows": 9, "seeds": 2}
    put(patterns, "comparisons/MaBERT--TTTTTTTTTTTT/CoLA", {"splits": {"dev": split}})
    split = split | {"difference": -0.01, "low": -0.09, "high": 0.07}
    put(patterns, "comparisons/MaBERT--TTTTTTTTTTTT/RTE", {"splits": {"dev": split}})
    page = report(patterns.parent)
    tables = [figure for figure in page.figures if " minus each of the others" in figure["text"]]
    for table in tables:
        row = next(row for row in table["rows"] if row[0] == "TTTTTTTTTTTT")
        assert row[1:] == ["+0.220 [+0.010, +0.400]", "−0.010 [−0.090, +0.070]"]
        assert table["bold"] == ["+0.220"]
        said = "95% interval, by paired bootstrap over 1 pretraining seed, 2 fine-tuning seeds of each"
        assert said in table["text"]
        assert "The chance in pretraining is not in it." in table["text"]
        assert "delete" not in table["text"]
    assert len(tables) == 2, "among the patterns and among the baselines"


def test_of_several_pretraining_seeds_the_chance_is_in_a_comparison(patterns: Path) -> None:
    split = {"metric": "mcc", "difference": 0.22, "low": 0.01, "high": 0.4, "confidence": 0.95, "rows": 9}
    split |= {"seeds": 6, "pretrained": 2}
    put(patterns, "comparisons/MaBERT--TTTTTTTTTTTT/CoLA", {"splits": {"dev": split}})
    text = report(patterns.parent).figure("MaBERT minus")["text"]
    assert "over 2 pretraining seeds, 3 fine-tuning seeds of each" in text
    assert "The chance in pretraining" not in text


def test_a_comparison_of_runs_that_were_made_again_is_named(patterns: Path) -> None:
    split = {"metric": "mcc", "difference": 0.23, "low": 0.01, "high": 0.4, "confidence": 0.95, "rows": 9, "seeds": 2}
    put(patterns, "comparisons/MaBERT--TTTTTTTTTTTT/CoLA", {"splits": {"dev": split}})
    text = report(patterns.parent).figure("MaBERT minus")["text"]
    assert "Runs were made again since: delete comparisons/MaBERT--TTTTTTTTTTTT/CoLA and run" in text


def test_differences_and_averages_on_a_part_of_the_data_say_so(results: Path) -> None:
    for model, budget in (("MaBERT", "@10"), ("BERT", "@10"), ("MaBERT", ""), ("BERT", "")):
        tuned(results / "tiny", f"{model}{budget}", "CoLA", [0.4, 0.5], "mcc")
        tuned(results / "tiny", f"{model}{budget}", "RTE", [0.6, 0.7], "accuracy", "(train subset, 99 rows)")
        if model == "BERT":
            split = {"metric": "accuracy", "difference": 0.0, "low": -0.1, "high": 0.1, "confidence": 0.95, "seeds": 2}
            put(results / "tiny", f"comparisons/MaBERT{budget}--BERT{budget}/RTE", {"splits": {"dev": split}})
    page = report(results)
    for title in ("Table B1", "Table 2"):
        head = page.figure(title)["rows"][0]
        assert "(train subset, 99 rows)" not in head[1]
        assert "(train subset, 99 rows)" in head[2]
        assert "(RTE: subset)" in head[3]
    tables = [figure for figure in page.figures if figure["text"].startswith("MaBERT minus")]
    assert len(tables) == 3  # after each budget, and among the baselines
    assert all("(train subset, 99 rows)" in table["rows"][0][2] for table in tables)
    assert "Average of 2 GLUE scores (RTE: subset) after each budget" in page.figure("Figure 3")["text"]


def test_patterns_without_mabert_are_shown(results: Path) -> None:
    for pattern in ("TTTTTTTTTTTT", "MMMMMMMMMMMM"):
        tuned(results / "tiny", f"{pattern}@20", "CoLA", [0.4, 0.5], "mcc")
    assert set(report(results).rows("Table 1")) >= {"TTTTTTTTTTTT", "MMMMMMMMMMMM"}


# What the paper's tables begin with: CoLA of the first model
PUBLISHED = {
    "Table B1": {"MaBERT": "0.574 ±0.016", "BERT": "0.419 ±0.017"},
    "Table B2": {"MaBERT": "0.612 ±0.015", "BERT": "0.452 ±0.018"},
    "Table B3": {"MaBERT": "0.634 ±0.020", "BERT": "0.515 ±0.018"},
    "Table 2": {"MaBERT": "0.676 ±0.018", "BERT": "0.522 ±0.017"},
    "Table 3 · PSM and MAP, centred": {
        "Full": "0.676 ±0.018",
        "PSM only": "0.641 ±0.022",
        "MAP only": "0.661 ±0.018",
        "None": "0.596 ±0.027",
    },
    "Table B4 · Pooling, causal": {
        "MAP": "0.676 ±0.018",
        "ATTN": "0.648 ±0.015",
        "CLS": "0.661 ±0.011",
        "MaskedMean": "0.651 ±0.018",
    },
}
OURS = {
    **{f"MaBERT{budget}": 0.10 + n / 100 for n, budget in enumerate(("@10", "@25", "@50", ""))},
    **{f"BERT{budget}": 0.20 + n / 100 for n, budget in enumerate(("@10", "@25", "@50", ""))},
    **{
        f"{model}~psm={psm},pooling={pooling}": first + n / 100
        for model, first in (("MaBERT", 0.3), ("MaBERT-forward-causal", 0.4))
        for n, (psm, pooling) in enumerate(
            [("pre+post", pooling) for pooling in ("map", "cls", "attention", "mean")]
            + [("none", pooling) for pooling in ("map", "cls")]
        )
    },
}
"""An invented score of its own for every model."""


def test_every_row_has_its_own_scores_beside_its_own_published_ones(results: Path) -> None:
    for model, score in OURS.items():
        tuned(results / "tiny", model, "CoLA", [score], "mcc")
    page = report(results)
    for title, rows in PUBLISHED.items():
        found = page.rows(title)
        for row, published in rows.items():
            assert found[f"{row}, published"][0] == published, (title, row)
    ours = {title: [page.rows(title)[row][0] for row in rows] for title, rows in PUBLISHED.items()}
    assert ours == {
        "Table B1": ["0.100", "0.200"],
        "Table B2": ["0.110", "0.210"],
        "Table B3": ["0.120", "0.220"],
        "Table 2": ["0.130", "0.230"],
        "Table 3 · PSM and MAP, centred": ["0.300", "0.310", "0.340", "0.350"],
        "Table B4 · Pooling, causal": ["0.400", "0.420", "0.410", "0.430"],
    }


def test_the_two_dev_sets_of_mnli_are_told_apart(results: Path) -> None:
    for model in ("MaBERT", "BERT"):
        scores = {"dev_matched": 0.6, "dev_mismatched": 0.7}
        put(results / "tiny", f"finetuning/{model}/0/MNLI/0", finetuned(scores))
    table = report(results)
    assert [column.split()[0] for column in table.figure("Table 2")["rows"][0][1:3]] == ["MNLI-m", "MNLI-mm"]
    assert table.rows("Table 2")["BERT"][:2] == ["0.600", "0.700"]
    assert table.rows("Table 2")["BERT, published"][:2] == ["0.826 ±0.014", "0.829 ±0.011"]


def test_what_a_number_is_of_stands_beside_it(results: Path) -> None:
    for length, kind in ((128, "original_full"), (1024, "block_sparse")):
        cell = efficiency_cell(tiny(), "paper", "bf16", "inference", "BigBird", length)
        put(
            results / "tiny",
            cell.name,
            time_of(7.0) | {"peak_gpu_bytes": 2**20, "warm_up": 11, "big_bird_attention": kind},
            cell.config,
        )
    page = report(results)
    memory, inference = (
        page.figure(f"{title}, paper")["text"] for title in ("Table B5 · Peak memory", "Table B7 · Inference")
    )
    assert "bf16 is autocast: weights are in float32" in memory
    assert "autocast" not in inference
    for text in (memory, inference):
        assert "BigBird attends to everything at 128 tokens, as it does in such short rows." in text
        assert "after 11 runs to warm up." in text
        assert "2 of 2 cells have not their 5 repetitions: their time was over." in text


def test_times_in_full_and_without_notes_are_shown_without_a_remark(results: Path) -> None:
    for cell in efficiency_cells(tiny(), ["cpu"]):
        put(results / "tiny", cell.name, time_of(7.0) | {"repetitions": 5}, cell.config)
    text = report(results).figure("Table B7 · Inference, cpu, fp32")["text"]
    assert "medians of 5 repetitions after 1 run to warm up. " in text
    assert "their time was over" not in text


def test_times_cut_short_and_notes_of_whoever_measured_are_said(results: Path) -> None:
    (results / "tiny" / "efficiency" / "cpu").mkdir(parents=True)
    (results / "tiny" / "efficiency" / "cpu" / "NOTE.txt").write_text("The host\nwas shared.\n")
    for cell in efficiency_cells(tiny(), ["cpu"]):
        few = {"repetitions": 2} if "/DeBERTa/512" in cell.name else {"repetitions": 5}
        put(results / "tiny", cell.name, time_of(7.0) | few, cell.config)
    text = report(results).figure("Table B7 · Inference, cpu, fp32")["text"]
    assert "1 of 16 cells have not their 5 repetitions: their time was over. The host was shared." in text


def test_bigbird_in_short_rows_is_said_to_attend_to_everything(invented: Page) -> None:
    assert invented.text.count("BigBird attends to everything in rows of up to 704 tokens") == 2


def test_tokens_are_counted_stage_by_stage() -> None:
    config = {"stage_lengths": [128, 512], "stage_fractions": [0.9, 0.1], "batch_size": 32}
    record = Record(Path("cell.json"), config, {"steps": 1500}, {})
    assert tokens_at(record, 1000) == 1000 * 128 * 32
    assert tokens_at(record, 1500) == 1350 * 128 * 32 + 150 * 512 * 32


def test_models_that_hardly_learnt_are_named(patterns: Path) -> None:
    config = pretraining_config(tiny(), "TTTTTTTTTTTT")
    put(patterns, "pretraining/TTTTTTTTTTTT/0", pretrained(6.7, config), config)
    text = report(patterns.parent).figure("Masked language")["text"]
    assert "Still within a tenth of the unigram entropy: TTTTTTTTTTTT." in text


def timed(folder: Path, kind: str, model: str, length: int, result: dict) -> None:
    cell = efficiency_cell(tiny(), "cpu", "fp32", kind, model, length)
    put(folder, cell.name, result, cell.config)


def time_of(milliseconds: float) -> dict:
    return {
        "median_ms": milliseconds,
        "samples_ms": [milliseconds] * 2,
        "repetitions": 2,
        "warm_up": 1,
        "peak_resident_bytes": 2**29,
    }


def test_no_published_time_stands_beside_batches_of_mixed_lengths(results: Path) -> None:
    for protocol in ("paper", "best"):
        for model in ("MaBERT", "BERT", "ALBERT", "Longformer", "BigBird", "DeBERTa"):
            cell = efficiency_cell(tiny(), protocol, "bf16", "inference", model, 128)
            put(results / "tiny", cell.name, time_of(7.0) | {"peak_gpu_bytes": 2**20}, cell.config)
    page = report(results)
    for title in ("Table B7 · Inference", "Headline · Baselines over MaBERT"):
        labels = {protocol: page.rows(f"{title}, {protocol}") for protocol in ("paper", "best")}
        assert any("published" in label for label in labels["paper"])
        assert not any("published" in label for label in labels["best"])
        assert "Published" not in page.figure(f"{title}, best")["text"]


def test_time_and_memory_by_length_and_what_did_not_fit(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: dict[str, list[float]] = {}

    def draw(axes: Any, line: Series, *rest: Any) -> None:
        if line.failed:
            marked[f"{axes.get_ylabel()}: {line.name}"] = list(line.failed)
        draw_line(axes, line, *rest)

    draw_line = plots._draw
    monkeypatch.setattr(plots, "_draw", draw)
    for model, milliseconds in {
        "MaBERT": 10.0,
        "BERT": 20,
        "ALBERT": 30,
        "Longformer": 1234,
        "BigBird": 5,
        "DeBERTa": 61,
    }.items():
        timed(results / "tiny", "inference", model, 128, time_of(milliseconds))
        timed(results / "tiny", "inference", model, 512, time_of(4 * milliseconds))
    limits = {"memory_limit_bytes": 20 * 2**30, "time_limit_seconds": 130.0}
    timed(results / "tiny", "inference", "BERT", 512, {"out_of_memory": True} | limits)
    timed(results / "tiny", "training", "BERT", 512, {"over_time": True} | limits)
    page = report(results)
    assert marked == {f"{what}: BERT": [512] for what in ("peak memory (MiB)", "inference (ms)", "training step (ms)")}
    assert page.rows("Table B7")["MaBERT"] == ["10.0", "40.0"]
    assert page.rows("Table B7")["BERT"] == ["20.0", "out of memory > 20.0 GiB"]
    assert page.rows("Table B7")["BERT, published"] == ["5.2", "5.3"]
    assert page.rows("Table B7")["Longformer"] == ["1,234.0", "4,936.0"]
    assert page.rows("Table B7")["ModernBERT"] == ["–", "–"]
    assert page.rows("Table B6")["BERT"] == ["–", "over time > 130 s"]
    assert page.rows("Table B5 · Peak memory")["MaBERT"] == ["512.0", "512.0"]
    assert page.figure("Table B7")["bold"] == ["5.2", "5.3", "5.0", "20.0"]
    headline = page.rows("Headline")
    assert headline["inference"] == ["128", "270.0", "10.0", "27.00"], "512 lacks BERT"
    assert headline["inference, published"][-1] == "2.43"
    assert headline["training step"] == ["–"] * 4
    assert headline["training step, published"][-1] == "2.36"
    assert "models of scale tiny, small-scale: not comparable" in page.figure("Table B7")["text"]


def test_schedules_stand_beside_the_published_losses(results: Path) -> None:
    folder = results / "tiny"
    for model, loss in (("TransMamba-V9", 3.0), ("Transformer", 3.5)):
        config = pretraining_config(tiny(), model) | {"stage_lengths": [128], "stage_fractions": [1.0]}
        put(folder, f"causal/{model}/0", pretrained(loss, config), config)
    page = report(results)
    rows = page.rows("TransMamba's Table 6")
    assert rows["TransMamba V9 [0, 128, 256, 512, 1024, 2048, 4096, 8192]"][0] == "2.974"
    assert rows["TransMamba V9 [0, 128, 256, 512, 1024, 2048, 4096, 8192], published"][0] == "2.898"
    assert rows["Transformer, published"][0] == "3.098"
    assert rows["Mamba-2"][0] == "–"
    assert rows["TransMamba V1 [2048]"][0] == "–", "a schedule of the scale that was not run"
    assert rows["TransMamba V1 [2048], published"][0] == "3.356"
    assert not any("V2 " in label for label in rows), "a schedule that the scale does not have"
    assert "2 of 5 cells" in page.figure("TransMamba's Table 6")["text"]
    assert "2 of 4 cells" in page.figure("Next-token loss")["text"]


def put_recall(results: Path, seeds: int, score: Callable[[str, int, int], float], **choices: Any) -> None:
    """Cells of MQAR with scores by architecture, seed and length of the row."""
    scale = replace(tiny(), recall=replace(tiny().recall, seeds=seeds, kinds=("mqar",), **choices))
    for cell in Recall(scale, Console(quiet=True), results).cells():
        _, model, _, seed = cell.name.split("/")
        asked = [
            {
                "length": length,
                "pairs": 4,
                "guessing": 0.575,
                "accuracy": {"early": 0.1, "middle": 0.2, "late": 0.25, "spread": score(model, int(seed), length)},
                "probes": {"recurrent-only": 0.15, "attention-only": 0.35, "none": 0.0},
            }
            for length in (64, 96)
        ]
        after = {"Mamba-2": None, "Transformer": 30 if seed == "0" else None}.get(model, 20 + 2 * int(seed))
        lessons = [
            {"pairs": 0, "length": 24, "loss": 0.1, "steps": 40, "learnt_after": 25},
            {"pairs": 2, "length": 11, "loss": 0.1, "steps": 40, "learnt_after": after},
        ]
        put(results / "tiny", cell.name, {"asked": asked, "lessons": lessons, "taught": 80}, cell.config)


@pytest.mark.parametrize("seeds", [1, 2])
def test_recall_is_shown_by_place_and_memory(results: Path, seeds: int) -> None:
    scores = {"Mamba-2": 0.2, "sequential": 0.5, "sequential-attention-first": 0.4, "parallel-gate": 0.9}
    put_recall(results, seeds, lambda model, seed, length: scores.get(model, 0.3))
    page = report(results)
    spread = " ±0.0%" if seeds > 1 else ""
    rows = page.rows("Recall by place and memory · mqar, 4 facts in 64 tokens")
    by_place, by_memory = ("10.0%", "20.0%", "25.0%"), ("15.0%", "35.0%", "0.0%")
    assert rows["sequential"] == [f"{value}{spread}" for value in (*by_place, "50.0%", *by_memory)]
    assert rows["parallel-gate"] == [f"{value}{spread}" for value in (*by_place, "90.0%", *by_memory)]
    rows = page.rows("Lessons · mqar")
    assert rows["Mamba-2"] == ["25", "not learnt"]
    assert rows["Transformer"] == ["25", "30" if seeds == 1 else "30 1 of 2"]
    assert rows["sequential"] == ["25", {1: "20", 2: "21"}[seeds]]
    lessons = page.figure("Lessons · mqar")["text"]
    assert "the loss of the last 20 was below 0.3 nats a token, or half of a guesser's" in lessons
    assert "A lesson is as long for every model, learnt or not." in lessons
    assert "in 24 tokens, 40 steps" in lessons
    text = page.figure("Recall by length · mqar")["text"]
    assert (
        "mqar, 4 facts, mean over the lengths of training: attention alone recalls 30.0%, the SSM alone 20.0%, the "
        "fusions 30.0% (parallel-mean) to 90.0% (parallel-gate)."
    ) in text
    guessed = "Who knows the row's values and guesses whose they are: 57.5% (simulated)."
    assert f"mqar, 4 facts. {guessed}" in text
    assert guessed in page.figure("Recall by place and memory · mqar, 4 facts in 64 tokens")["text"]
    assert "mqar, 4 facts: no row of training had 96 tokens." in text
    longer = page.figure("Recall by place and memory · mqar, 4 facts in 96 tokens")
    assert "No row of training was so long." in longer["text"]
    assert "80 steps of lessons, then 40 steps of 768 tokens on all lengths of training" in text
    said = "mqar, 4 facts, spread: parallel minus sequential, in points: +0.0 at 64, +0.0 at 96; too few seeds"
    assert said in text
    assert "mamba1" not in text


def test_what_each_memory_carries_is_said(results: Path) -> None:
    put_recall(results, 1, lambda *_: 0.3)
    text = report(results).figure("Recall by length · mqar")["text"]
    assert (
        "mqar, 4 facts, 64 tokens: through their states alone the hybrids recall 15.0% to 15.0%, through attention "
        "alone 35.0% to 35.0%, through neither 0.0% to 0.0%."
    ) in text


def test_at_the_ceiling_nothing_is_decided(results: Path) -> None:
    put_recall(results, 5, lambda model, seed, length: 0.995 - 0.001 * (length == 96))
    text = report(results).figure("Recall by length · mqar")["text"]
    assert text.count("From 64 to 96, beyond training: all at the ceiling.") == 2, "spread, not early"
    assert text.count("no change seen") == 2


@pytest.mark.parametrize("seeds", [1, 5])
def test_facts_that_no_row_of_training_has_room_for_are_shown(results: Path, seeds: int) -> None:
    put_recall(results, seeds, lambda *_: 0.3)
    for path in (results / "tiny").rglob("*.json"):
        content = json.loads(path.read_text())
        more = [asked | {"pairs": 9} for asked in content["result"]["asked"] if asked["length"] == 96]
        more[0]["guessing"] = 0.1 if "/sequential/" in str(path) else 0.2
        content["result"]["asked"] += more
        path.write_text(json.dumps(content))
    text = report(results).figure("Recall by length · mqar")["text"]
    assert "mqar, 9 facts: no row of training had 96 tokens." in text
    assert "mqar, 9 facts. Who knows the row's values and guesses whose they are: 10.0% or 20.0% (simulated)." in text


@pytest.mark.parametrize(
    ("choices", "span"),
    [({"lengths": (64, 96), "beyond": ()}, "From 64 to 96: "), ({}, "From 64 to 96, beyond training: ")],
)
@pytest.mark.parametrize(
    ("longer", "difference", "expected"),
    [
        (0.2, "+20.0", "+19.4 to +20.6, gains with length"),
        (-0.2, "-20.0", "-20.6 to -19.4, loses with length"),
        (0.0, "+0.0", "-0.6 to +0.6, no change seen"),
    ],
)
def test_a_family_that_is_better_in_longer_rows_is_found(
    results: Path, longer: float, difference: str, expected: str, choices: dict[str, Any], span: str
) -> None:
    """Merged attention stands apart: what it recalls tells nothing of the other parallel ones."""

    def score(model: str, seed: int, length: int) -> float:
        if "merge" in model:
            return 0.9
        is_it = model.startswith("parallel") and length == 96
        return 0.4 + 0.1 * seed + (longer + 0.002 * (seed - 2) if is_it else 0.0)

    put_recall(results, 5, score, **choices)
    text = report(results).figure("Recall by length · mqar")["text"]
    said = f"+0.0 ±0.0 at 64, {difference} ±0.4 at 96 (95% each, over the seeds). {span}{expected}"
    assert f"mqar, 4 facts, spread: parallel minus sequential, in points: {said}" in text
    assert "all 4 of them hold the truth with 95% (Bonferroni)" in text
    assert "mqar, 4 facts, early: parallel minus sequential, in points: +0.0 ±0.0 at 64, +0.0 ±0.0 at 96" in text
    assert "mqar, 4 facts, spread: merged minus sequential, in points: +30.0 ±19.6 at 64, +30.0 ±19.6 at 96" in text


def test_other_mixers_are_named(results: Path) -> None:
    put_recall(results, 1, lambda *_: 0.3, ssm="mamba1", sliding_window=17)
    text = report(results).figure("Recall by length · mqar")["text"]
    assert "the SSM is mamba1 in all of them; attention reaches 17 tokens; 80 steps of lessons" in text


def test_recall_before_and_after_paraphrases_stands_together(results: Path) -> None:
    folder, config = results / "tiny", pretraining_config(tiny(), "sequential") | {"stage_lengths": [64]}
    put(folder, "causal/sequential/0", pretrained(4.0, config | {"stage_fractions": [1.0]}), config)
    for text, seed, accuracy in (
        ("before", 0, 0.1),
        ("paraphrase@25", 0, 0.3),
        ("paraphrase@25", 1, 0.5),
        ("none", 0, 0.2),
    ):
        result = {
            "held_out_loss": 3.974 if text == "before" else 4.1,
            "recall": {
                kind: {
                    length: {"accuracy": accuracy + less + longer, "loss": 2.0 + less, "guessing": 0.555}
                    for length, longer in (("1024", -0.1), ("256", 0.0))
                }
                for kind, less in (("mqar", 0.0), ("phonebook", 0.01), ("passkey", 0.02))
            },
            "gains": {"paraphrase": {"gain": 0.25}, "verbatim": {"gain": 0.35}},
        }
        if text != "before":
            result["tokens"] = 5_000
        put(folder, f"paraphrase/sequential/{text}/{seed}", result)
    lessons = [{"pairs": n, "learnt_after": after} for n, after in ((0, 30), (2, 40), (4, None))]
    taught = {"run": {"steps": 1_000}, "task": {"kind": "mqar"}}
    put(folder, "paraphrase/sequential/base/0", {"lessons": lessons, "taught": 900}, taught)
    page = report(results)
    said = "taught mqar, with text of training between, in 1,900 steps (2 of 3 lessons learnt)"
    assert said in page.figure("Paraphrases · sequential")["text"]
    guessed = "Who knows a row's answers and guesses whose they are: mqar 55.5%"
    assert guessed in page.figure("Paraphrases · sequential")["text"]
    rows = page.rows("Paraphrases · sequential")
    assert list(rows) == ["before", "none", "paraphrase@25"]
    assert rows["before"][:5] == ["3.974", "10.0%", "2.000", "0.0%", "2.000"]
    assert rows["before"][5:] == [
        "11.0%",
        "2.010",
        "1.0%",
        "2.010",
        "12.0%",
        "2.020",
        "2.0%",
        "2.020",
        "0.250",
        "0.350",
    ]
    head = page.figure("Paraphrases · sequential")["rows"][0][2:-2:2]
    asked = [f"{kind}, {length} tokens" for kind in ("mqar", "phonebook", "passkey") for length in ("256", "1,024")]
    assert all(column.startswith(name) for column, name in zip(head, asked, strict=True)), head
    assert rows["paraphrase@25"][:2] == ["4.100 ±0.000", "40.0% ±14.1%"]
    assert rows["none"][0] == "– 1 of 2 cells"


def test_training_times_are_relative_to_the_transformers(results: Path) -> None:
    folder = results / "tiny"
    for cell in timing_cells(tiny()):
        config, point = cell.config, cell.config["point"]
        if point is None:
            milliseconds = {"TransMamba-V9": 30.0, "Transformer": 40.0, "Mamba-2": 50.0}.get(
                config["architecture"], 60.0
            )
            put(folder, cell.name, time_of(milliseconds * config["length"] / 128), config)
        else:
            put(folder, cell.name, time_of(10.0 + abs(point - config["length"] / 2) / 10), config)
    page = report(results)
    rows = page.rows("TransMamba's Table 5 · Time of a training step, fp32")
    assert rows["TransMamba V9 [0, 128, 256, 512, 1024, 2048, 4096, 8192]"] == ["30", "0.75", "60", "0.75", "–", "–"]
    assert rows["Transformer"] == ["40", "1.00", "80", "1.00", "–", "–"]
    assert rows["Mamba-2, published"] == ["", "", "", "", "", "0.77"]
    assert (
        "the fastest of these TransPoints is 128 (0.44 of attention alone)"
        in page.figure("TransMamba's Figure 4 (a) · Cost of a layer by TransPoint, fp32")["text"]
    )


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("pretraining", "Table 1"),
        ("finetuning", "Table 1"),
        ("drift", "Drift of"),
        ("efficiency", "Figure 5"),
        ("tuning", "Hyperparameters"),
        ("causal", "TransMamba's Table 6"),
        ("causal-step", "TransMamba's Table 5"),
        ("causal-layer", "TransMamba's Figure 4"),
        ("recall", "Recall by length"),
        ("paraphrase", "Paraphrases"),
    ],
)
def test_each_kind_of_cell_can_be_the_only_one(invented: Page, results: Path, kind: str, title: str) -> None:
    shutil.copytree(invented.results / "tiny" / kind, results / "tiny" / kind)
    page = report(results)
    assert any(figure["text"].startswith(title) for figure in page.figures)


def test_a_run_that_was_stopped_anywhere_can_be_shown(invented: Page, results: Path) -> None:
    cells = sorted(invented.results.rglob("*.json"))
    for cell in random.Random(0).sample(cells, len(cells) // 2):
        target = results / cell.relative_to(invented.results)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(cell)
    page = report(results)
    assert page.open == []
    assert any("1 of 2 cells" in figure["text"] for figure in page.figures)


def test_drift_is_shown_by_mode_with_its_findings(invented: Page) -> None:
    row = invented.rows("Drift of [CLS]")["forward, centered, right"]
    assert re.fullmatch(r"\d\.\de−2 \(\d\.\de−[12]\)", row[0])
    assert re.fullmatch(r"\d\.\de−1[45] \(\d\.\de−1[45]\)", row[-1])
    figure = invented.figure("Figures 3 and 4 (drift) · forward scan, centered convolution, pads on the left")
    assert "Invented finding about left pads." in figure["text"]
    assert "1,043 rows of CoLA dev" in figure["text"]


@pytest.mark.parametrize(
    "title",
    [
        "Table 1",
        "Table 2",
        "Table B1",
        "Figure 3",
        "Table 3 · PSM and MAP, centred",
        "Table 3 · PSM and MAP, causal",
        "Table B4 · Pooling, centred",
        "Figure 5 · Efficiency by length, cpu, bf16",
        "Headline · Baselines over MaBERT, cpu, fp32",
        "Table B5 · Parameters",
        "Hyperparameters of fine-tuning",
        "Next-token loss while pretraining",
        "Hybrids as language models",
        "Recall by length · mqar",
        "Lessons · phonebook",
        "Recall by place and memory · phonebook, 4 facts in 64 tokens",
        "Recall by place and memory · passkey in 64 tokens",
        "Paraphrases · sequential",
        "TransMamba's Table 6 · Loss by schedule",
        f"TransMamba's Table 5 · Time of a training step, {'bf16' if torch.cuda.is_available() else 'fp32'}",
        f"TransMamba's Figure 4 (a) · Cost of a layer by TransPoint, {'bf16' if torch.cuda.is_available() else 'fp32'}",
    ],
)
def test_every_experiment_has_its_tables(invented: Page, title: str) -> None:
    assert invented.figure(title)


def test_ablations_stand_beside_the_published_variants(invented: Page) -> None:
    assert invented.rows("Table 3 · PSM and MAP, centred")["PSM only, published"][0] == "0.641 ±0.022"
    assert invented.rows("Table B4 · Pooling, causal")["MaskedMean, published"][0] == "0.651 ±0.018"


def test_the_summary_links_to_every_experiment_and_says_what_is_missing(invented: Page, patterns: Path) -> None:
    assert "#tiny-efficiency" in invented.links
    assert "anything at scale base" in invented.text
    text = report(patterns.parent).text
    assert "Drift under padding: Figures 3 and 4 (scale tiny)" in text
    assert '<a href="#tiny-patterns">10 of 15</a>' in text


def test_the_page_is_whole_and_needs_nothing_else(invented: Page) -> None:
    assert invented.open == []
    assert len(invented.ids) == len(set(invented.ids))
    assert invented.loads == ["data:,"]
    assert not re.search(r"<script|@import|url\((?!#)", invented.text)
    assert {link for link in invented.links if link.startswith("#")} <= {f"#{name}" for name in invented.ids}
    outside = {link for link in invented.links if not link.startswith("#")}
    assert outside == {"https://arxiv.org/abs/2603.03001", "https://arxiv.org/abs/2503.24067"}
    references = set(re.findall(r'(?:url\(|href=")#([mp][0-9a-f]{10})', invented.text))
    assert references
    assert references <= set(invented.ids)


def test_plots_take_every_colour_from_the_page(invented: Page) -> None:
    plots = re.findall(r"<svg viewBox=.*?</svg>", invented.text, flags=re.DOTALL)
    assert len(plots) > 30
    for plot in plots:
        assert not re.search(r"#[0-9a-f]{6}\b|: (?:black|white)|font-family", re.sub(r"#[mp][0-9a-f]{10}", "", plot))
    used = set(re.findall(r"var\(--([a-z]+)\)", invented.text))
    assert used <= set(re.findall(r"--([a-z]+):", invented.text))


def test_the_same_results_give_the_same_page_in_another_process(invented: Page, tmp_path: Path) -> None:
    command = (
        "import sys; from pathlib import Path; from mabert.experiments.report import write_report;"
        "write_report(*map(Path, sys.argv[1:]))"
    )
    subprocess.run(
        [sys.executable, "-c", command, invented.results, tmp_path / "page.html"],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
    )
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == invented.text


def test_what_is_written_in_a_result_cannot_become_markup(patterns: Path) -> None:
    hardware = STAMP["hardware"] | {"processor": "<script>alert(1)</script>"}
    tuned(patterns, "MaBERT", "CoLA", [0.4, 0.4], "mcc", "<b>bold</b>", hardware=hardware)
    text = report(patterns.parent).text
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;bold" in text


def test_base_is_not_called_small(results: Path) -> None:
    for model in ("MaBERT@10", "TTTTTTTTTTTT@10"):
        tuned(results / "base", model, "CoLA", [0.4, 0.5], "mcc")
    page = report(results)
    assert "small-scale" not in page.figure("Table 1")["text"]
    assert "Published: after" not in page.figure("Table 1")["text"]


def test_an_empty_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing holds no results\. `mabert experiment all --scale tiny` makes some"):
        write_report(tmp_path / "nothing", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_folder_of_no_scale_is_refused(results: Path) -> None:
    put(results / "huge", "pretraining/MaBERT/0", {})
    with pytest.raises(ValueError, match=r"huge: there is no scale of that name\. There are tiny, cpu"):
        write_report(results, results / "page.html")


@pytest.mark.parametrize("content", ['{"cell": "x", "conf', "[]", '{"config": {}, "stamp": {}}'])
def test_a_broken_file_is_named(patterns: Path, content: str) -> None:
    (patterns / "finetuning/MaBERT/0/CoLA/1.json").write_text(content)
    with pytest.raises(ValueError, match=r"finetuning/MaBERT/0/CoLA/1\.json is not the result of a cell"):
        write_report(patterns.parent, patterns / "page.html")


def test_a_result_without_what_is_needed_is_named(patterns: Path) -> None:
    path = patterns / "finetuning/MaBERT/0/CoLA/1.json"
    content = json.loads(path.read_text())
    del content["result"]["splits"]["dev"]["metrics"]["mcc"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"CoLA/1\.json: its result has no splits > dev > metrics > mcc"):
        write_report(patterns.parent, patterns / "page.html")


@pytest.mark.parametrize(
    ("method", "params", "fault"),
    [
        ("Runtime.exceptionThrown", {"exceptionDetails": {"text": "Uncaught E"}}, "exception: Uncaught E"),
        ("Runtime.consoleAPICalled", {"type": "error", "args": [{"value": "planted"}]}, "console: planted"),
        ("Runtime.consoleAPICalled", {"type": "log", "args": []}, None),
        ("Log.entryAdded", {"entry": {"level": "error", "text": "bad", "url": "file:///x"}}, "console: bad file:///x"),
        ("Network.loadingFailed", {"errorText": "net::ERR"}, "not loaded: net::ERR"),
        (
            "Network.requestWillBeSent",
            {"request": {"url": "https://a.example/font"}},
            "asks for https://a.example/font",
        ),
        ("Network.requestWillBeSent", {"request": {"url": "file:///page.html"}}, None),
    ],
)
def test_what_the_browser_reports_is_a_fault_or_not(method: str, params: dict, fault: str | None) -> None:
    assert screenshot_report.fault_of({"method": method, "params": params}, "file:///page.html") == fault


@pytest.mark.parametrize("faults", [[], ["console error: planted"]])
def test_a_fault_that_was_looked_at_fails_the_command(
    patterns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    monkeypatch.setenv("CHROMIUM", "a browser")
    monkeypatch.setattr(screenshot_report, "chromium", lambda executable: contextlib.nullcontext())
    monkeypatch.setattr(screenshot_report, "look", lambda browser, page, view, output: faults)
    words = ["screenshot_report.py", "--results", str(patterns.parent), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert screenshot_report.main() == len(faults)
