"""Write docs/results.md and docs/report.html from the files in results/: no number there is typed by hand.

python scripts/render_results.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path

import render_gpu
import render_kernels
import render_pretraining
import render_triton_code
from mabert.experiments.report.collect import read_results
from mabert.experiments.report.page import render as render_report

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RUNS = ROOT / "results" / "runs"
EXPERIMENTS = ROOT / "results" / "experiments"
REPORT = ROOT / "docs" / "report.html"


def pretraining_rows(run: dict) -> list[str]:
    """One row a stage length."""
    return [
        f"| {held['length']} | {held['loss']:.3f} | {held['unigram_entropy']:.3f} | {held['accuracy']:.1%} |"
        for held in run["pretrain"]["held_out"]
    ]


def task_rows(run: dict) -> list[str]:
    """One row a task and dev set."""
    rows = []
    for task, result in sorted(run["finetune"].items()):
        for split, scores in result["splits"].items():
            measured = ", ".join(f"{name} {value:.3f}" for name, value in scores["metrics"].items())
            majority = ", ".join(f"{name} {value:.3f}" for name, value in scores["majority"].items())
            rows.append(f"| {task} {split} {scores['subset']} | {scores['rows']} | {measured} | {majority} |")
    return rows


def section(run: dict) -> str:
    """One run: what it was, what it reached, where and with what."""
    pretrain, where = run["pretrain"], run["pretrain"]["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", "mabert", "torch", "transformers"))
    lines = [
        f"## {run['title']}",
        "",
        run["about"],
        "",
        "```",
        *run["commands"],
        "```",
        "",
        f"{pretrain['parameters']:,} parameters, {pretrain['steps']:,} steps, {pretrain['tokens']:,} tokens in "
        f"{pretrain['seconds'] / 60:.0f} minutes ({pretrain['tokens_per_second']:,.0f} tokens/s), "
        f"{pretrain['data_wait']:.1%} of the training time spent waiting for data.",
        "",
        "| held-out rows of | loss (nats) | unigram entropy | masked accuracy |",
        "|---|---|---|---|",
        *pretraining_rows(run),
        "",
        "| task, one seed | rows | score | majority class |",
        "|---|---|---|---|",
        *task_rows(run),
        "",
        f"{where['device']}, {where['threads']} thread(s), {where['processes']} process(es); {versions}; "
        f"commit {run['commit']}; {run['date']}.",
    ]
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole page."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RUNS.glob("*.json"))]
    head = (
        "# Results\n\nRendered from `results/` by `scripts/render_results.py`. All of it is small-scale so far. The "
        "paper's experiments have a page of their own, [report.html](report.html).\n"
    )
    parts = [
        head,
        *(section(run) for run in runs),
        render_pretraining.section(),
        render_kernels.section(),
        render_gpu.section(),
        render_triton_code.section(),
    ]
    return "\n".join(part for part in parts if part)


def pages() -> dict[Path, str]:
    """Every page that is rendered, with its text."""
    return {PAGE: render(), REPORT: render_report(read_results(EXPERIMENTS))}


def main() -> int:
    """Write the pages, or check that they are what the files say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    if parser.parse_args().check:
        stale = [page.name for page, text in pages().items() if page.read_text(encoding="utf-8") != text]
        if stale:
            print(f"docs/{', docs/'.join(stale)}: out of date, run `make results`", file=sys.stderr)
        return 1 if stale else 0
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
    for part in (render_kernels, render_pretraining):
        if part.MEASURED.exists():
            part.plot()
    return 0


if __name__ == "__main__":
    sys.exit(main())
