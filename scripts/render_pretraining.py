"""The part of the results on a MaBERT and its Transformer twin: learning curves and tasks from the file of the run."""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "pretraining-cpu.json"
PLOT = ROOT / "docs" / "images" / "pretraining-cpu.png"


def section() -> str:
    """The Markdown of the section, empty while nothing is measured."""
    if not MEASURED.exists():
        return ""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    models, stamp = results["models"], results["stamp"]
    first = next(iter(models.values()))
    where = first["pretrain"]["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", "mabert", "torch", "transformers"))
    changes = " with uncommitted changes" if stamp["uncommitted_changes"] else ""
    seeds = len(next(iter(first["finetune"].values())))
    lines = [
        "## A MaBERT and its Transformer twin on one CPU",
        "",
        "Small-scale: the `tiny` recipe with the pattern MMT repeated and with attention alone, at equal width and "
        f"depth, for {first['pretrain']['steps']:,} steps ({first['pretrain']['tokens']:,} tokens) of English "
        "Wikipedia and books, with one vocabulary of 16,000. One pretraining seed each, one thread each, two at a "
        "time, resumed over several commits of a day and paused while other things were measured: the speeds are lower "
        "bounds, and the commit below is that of the tasks. Published "
        "models saw thousands of times more text: what these two differ in says little about theirs. "
        "By `python -m benchmarks.pretraining`.",
        "",
        "| | parameters | held-out loss, rows of 128 | of 512 | masked accuracy (512) | unigram entropy | tokens/s |",
        "|---|---|---|---|---|---|---|",
        *[pretraining_row(name, model["pretrain"]) for name, model in models.items()],
        "",
        "![Held-out loss over optimizer steps](images/pretraining-cpu.png)",
        "",
        *near_the_start(models),
        f"Fine-tuned on the complete training sets, mean ± standard deviation over {seeds} fine-tuning seeds of one "
        f"pretrained model; learning rate {results['learning_rate']}, not tuned; epochs: "
        + ", ".join(f"{task} {epochs}" for task, epochs in results["epochs"].items())
        + ".",
        "",
        "| dev set | rows | " + " | ".join(models) + " | majority class |",
        "|---|---|" + "---|" * (len(models) + 1),
        *[row for task in first["finetune"] for row in task_rows(task, models)],
        "",
        f"{where['device']}; {versions}; commit {stamp['commit'][:7]}{changes}; {stamp['date']}.",
    ]
    return "\n".join(lines) + "\n"


def near_the_start(models: dict) -> list[str]:
    """Which models have hardly learnt more than how frequent words are, and what that means for the page."""
    stuck = []
    for name, model in models.items():
        (held_out,) = (held for held in model["pretrain"]["held_out"] if held["length"] == 128)
        if held_out["loss"] > 0.9 * held_out["unigram_entropy"]:
            stuck.append(name)
    if not stuck:
        return []
    return [
        f"Still within a tenth of the unigram entropy: {', '.join(stuck)}. A convolution is given a token's "
        "neighbours; attention has to learn from its position table where they are, and in so few tokens it did not "
        "(with rotary positions it began to: `docs/LOG.md`). What follows compares a model that learnt with one that "
        "hardly did, not two architectures at their best.",
        "",
    ]


def pretraining_row(name: str, run: dict) -> str:
    """One model of the first table."""
    by_length = {held["length"]: held for held in run["held_out"]}
    return (
        f"| {name} | {run['parameters']:,} | {by_length[128]['loss']:.3f} | {by_length[512]['loss']:.3f} | "
        f"{by_length[512]['accuracy']:.1%} | {by_length[512]['unigram_entropy']:.3f} | "
        f"{run['tokens_per_second']:,.0f} |"
    )


def task_rows(task: str, models: dict) -> list[str]:
    """One row a dev set and metric."""
    rows = []
    some = next(iter(models.values()))["finetune"][task][0]["splits"]
    for split, scores in some.items():
        for metric in scores["metrics"]:
            cells = []
            for model in models.values():
                values = [seed["splits"][split]["metrics"][metric] for seed in model["finetune"][task]]
                cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
            rows.append(
                f"| {task} {split} {metric} {scores['subset']} | {scores['rows']:,} | {' | '.join(cells)} | "
                f"{scores['majority'][metric]:.3f} |"
            )
    return rows


def plot() -> None:
    """Held-out loss over steps, one line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    entropy = 0.0
    for (name, model), colour in zip(results["models"].items(), ("tab:blue", "tab:orange"), strict=True):
        points = [point for point in model["evaluations"] if point["length"] == 128]
        axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=name, color=colour)
        entropy = points[-1]["unigram_entropy"]
    axes.axhline(entropy, color="0.4", linestyle="--", label="unigram entropy")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("held-out loss, rows of 128 (nats)")
    axes.grid(alpha=0.25)
    axes.legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    pyplot.close(figure)
