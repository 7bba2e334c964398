"""A folder of results with invented numbers, to see the report without having measured anything."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from mabert.data.recall import KINDS as RECALL_KINDS
from mabert.data.recall import PLACES
from mabert.experiments.architectures import BASELINES, MABERTS
from mabert.experiments.catalogue import named
from mabert.experiments.causal_architectures import CAUSAL_REFERENCES, HYBRIDS, transmamba_name
from mabert.experiments.drift import MEASURES, MODES, PADS
from mabert.experiments.efficiency import KINDS, MODELS, PROTOCOLS, efficiency_cell
from mabert.experiments.finetuning import main_metric
from mabert.experiments.paraphrase import GAINS
from mabert.experiments.recall import Recall
from mabert.experiments.report.collect import SCORES
from mabert.experiments.scales import SCALES, Scale
from mabert.experiments.transpoints import timing_cells
from mabert.models.causal import MEMORIES

STAMP = {
    "date": "2026-01-02",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "uncommitted_changes": False,
    "hardware": {
        "processor": "Invented CPU",
        "cores": 2,
        "threads": 1,
        "instruction_set": "avx512",
        "memory_gib": 23.5,
        "gpu": None,
    },
    "versions": {"python": "3.11.7", "mabert": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
}
BEST = {"CoLA": 0.35, "SST-2": 0.84, "MRPC": 0.82, "QQP": 0.78, "MNLI": 0.62, "QNLI": 0.7, "RTE": 0.56}


def put(folder: Path, name: str, result: dict[str, Any], config: dict[str, Any] | None = None, **stamp: Any) -> Path:
    """Write a cell's file."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"cell": name, "config": config or {}, "result": result, "stamp": STAMP | stamp}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def finetuned(scores: dict[str, float], subset: str = "", metric: str = "accuracy") -> dict[str, Any]:
    """The result of a run: its score on each split."""
    splits = {
        split: {"rows": 1043, "subset": subset, "metrics": {metric: score}, "majority": {metric: 0.5}}
        for split, score in scores.items()
    }
    return {"splits": splits, "choice": {"learning_rate": 1e-3, "batch_size": 32, "epochs": 3}}


def pretrained(loss: float, config: dict[str, Any], parameters: int = 2_842_752) -> dict[str, Any]:
    """The result of a pretraining that falls from near the unigram entropy towards a loss."""
    entropy, steps = 6.793, round(config["steps"] * config["budget"])
    fell = [
        (step, loss + (entropy + 0.4 - loss) * math.exp(-4 * step / steps))
        for step in range(0, steps + 1, max(1, steps // 15))
    ]
    evaluations = [{"step": s, "length": 128, "loss": x, "unigram_entropy": entropy} for s, x in fell]
    return {
        "parameters": parameters,
        "encoder_parameters": parameters - 2_100_000,
        "steps": steps,
        "tokens": 51_000_000 * config["budget"],
        "evaluations": evaluations,
        "held_out": [
            {
                "length": length,
                "loss": loss - length / 5000,
                "accuracy": 0.55 - loss / 20,
                "unigram_entropy": entropy,
            }
            for length in (128, 512)
        ],
    }


def pretraining_config(scale: Scale, name: str, budget: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """What a pretraining cell says of itself."""
    return {
        "architecture": name,
        "size": scale.model_size(),
        "match_parameters": scale.match_parameters,
        "text": {"text": {"wiki.train.txt": 1, "books.train.txt": 1}, "vocab_size": scale.vocab_size},
        "steps": scale.steps,
        "budget": budget,
        "batch_size": scale.batch_size,
        "stage_lengths": scale.stage_lengths,
        "stage_fractions": scale.stage_fractions,
        "seed": seed,
    }


def everything(results: Path, name: str, seed: int = 0) -> Path:
    """Invent every experiment of a scale, and return its folder."""
    scale, folder, rng = SCALES[name](), results / name, random.Random(f"{name} {seed}")
    for architecture, budget in _models(scale):
        model = architecture if budget == 1 else f"{architecture}@{100 * budget:g}"
        quality = rng.gauss(0, 0.015) + 0.04 * math.log10(budget) + 0.03 * architecture.startswith("MaBERT")
        config = pretraining_config(scale, architecture, budget)
        put(
            folder,
            f"pretraining/{model}/0",
            pretrained(4.2 - 12 * quality, config, rng.randint(2_600_000, 2_900_000)),
            config,
        )
        _finetune(folder, scale, model, quality, rng)
        if architecture != "MaBERT":
            _compare(folder, scale, model.replace(architecture, "MaBERT"), model)
    for architecture in ("MaBERT", "MaBERT-forward-causal"):
        full, *variants = [
            f"{architecture}~psm={variant}"
            for variant in ("pre+post,pooling=map", "pre+post,pooling=cls", "none,pooling=map", "none,pooling=cls",
                            "pre+post,pooling=attention", "pre+post,pooling=mean")
        ]  # fmt: skip
        _finetune(folder, scale, full, rng.gauss(0, 0.02), rng)
        for variant in variants:
            _finetune(folder, scale, variant, rng.gauss(0, 0.02), rng)
            _compare(folder, scale, full, variant)
    _drift(folder, rng)
    _efficiency(folder, scale, rng)
    _transpoints(folder, scale, rng)
    _recall(folder, scale, rng)
    return folder


def _models(scale: Scale) -> Iterator[tuple[str, float]]:
    own = ("ModernBERT", "MMMMMMMMMMMM", "TTTTTTTTTTTT", "TTTTTTTTTTTT+rope", *MABERTS)
    found = [(name, budget) for name in ("MaBERT", *BASELINES) for budget in scale.budgets]
    found += [(name, 1.0) for name in own] + [(named(pattern), scale.pattern_budget) for pattern in scale.patterns]
    return iter(dict.fromkeys(found))


def _finetune(folder: Path, scale: Scale, model: str, quality: float, rng: random.Random) -> None:
    for task in scale.tasks:
        metric = main_metric(task)
        splits = [score.split for score in SCORES if score.task == task]
        point = {"learning_rate": 1e-3, "batch_size": 32, "epochs": 3}
        if "~" not in model:
            put(
                folder,
                f"tuning/{model}/0/{task}",
                {"choice": point, "tried": []},
                {"grid": [point, point | {"learning_rate": 3e-4}]},
            )
        for seed in range(scale.finetuning_seeds):
            scores = {split: BEST[task] + 2 * quality + rng.gauss(0, 0.012) for split in splits}
            subset = "(train subset, 10000 rows)" if task == "SST-2" else ""
            put(folder, f"finetuning/{model}/0/{task}/{seed}", finetuned(scores, subset, metric))


def _compare(folder: Path, scale: Scale, one: str, other: str) -> None:
    for task in scale.tasks:
        metric, splits = main_metric(task), {}
        for split in [score.split for score in SCORES if score.task == task]:
            means = [
                fmean(
                    json.loads((folder / f"finetuning/{model}/0/{task}/{seed}.json").read_text())["result"]["splits"][
                        split
                    ]["metrics"][metric]
                    for seed in range(scale.finetuning_seeds)
                )
                for model in (one, other)
            ]
            splits[split] = {
                "metric": metric,
                "difference": means[0] - means[1],
                "low": means[0] - means[1] - 0.025,
                "high": means[0] - means[1] + 0.02,
                "confidence": 0.95,
                "rows": 1043,
                "seeds": scale.finetuning_seeds,
                "pretrained": 1,
            }
        put(folder, f"comparisons/{one}--{other}/{task}", {"splits": splits})


def _drift(folder: Path, rng: random.Random) -> None:
    for name, choices in MABERTS.items():
        if choices["scan_direction"] not in ("forward", "bidirectional"):
            continue
        for side in ("right", "left"):
            modes = {}
            for mode in MODES:
                height = {"none": 0.05, "post": 0.02, "pre": 0.004, "pre+post": 0.0035}.get(mode, 1e-14) * rng.uniform(
                    0.7, 1.3
                )
                mean = [height * (1 - math.exp(-pads / 20)) for pads in PADS]
                modes[mode] = {
                    measure: {"mean": mean, "std": [0.4 * x for x in mean], "max": [3 * x for x in mean]}
                    for measure in MEASURES
                }
            findings = [f"Invented finding about {side} pads.", "Another one, which says where the paper is met."]
            result = {"rows": 1043, "data": "CoLA dev", "pads": list(PADS), "modes": modes, "findings": findings}
            put(folder, f"drift/{name}/{choices['scan_direction']}-{choices['conv_mode']}/{side}", result)


def _transpoints(folder: Path, scale: Scale, rng: random.Random) -> None:
    for name in (*CAUSAL_REFERENCES, *map(transmamba_name, scale.causal.schedules)):
        config = pretraining_config(scale, name) | {
            "steps": scale.causal.steps,
            "batch_size": scale.causal.batch_size,
            "stage_lengths": [scale.causal.length],
            "stage_fractions": [1.0],
        }
        put(folder, f"causal/{name}/0", pretrained(4.2 + rng.gauss(0, 0.1), config), config)
    for cell in timing_cells(scale):
        cost = (cell.config["length"] / 128) ** 1.2 * (1 if cell.config["point"] is None else 0.1)
        milliseconds = 60 * cost * rng.uniform(0.8, 1.3)
        result = {
            "median_ms": milliseconds,
            "samples_ms": [milliseconds * rng.gauss(1, 0.03) for _ in range(5)],
            "repetitions": 5,
            "warm_up": 1,
            "peak_resident_bytes": 2**29,
        }
        put(folder, cell.name, result, cell.config)


def _recall(folder: Path, scale: Scale, rng: random.Random) -> None:
    for name in HYBRIDS:
        config = pretraining_config(scale, name) | {"stage_lengths": [scale.causal.length], "stage_fractions": [1.0]}
        put(folder, f"causal/{name}/0", pretrained(4.2 + rng.gauss(0, 0.1), config), config)
    for model in scale.paraphrase.models:
        lessons = [{"pairs": 0, "length": 48, "steps": 10, "loss": 0.2, "learnt_after": 8}]
        taught = {"run": {"steps": 20, "tokens": 512}, "task": {"kind": "mqar"}}
        put(folder, f"paraphrase/{model}/base/0", {"lessons": lessons, "taught": 10, "last_loss": 0.1}, taught)
        for text in ("before", "none", "paraphrase@25", "verbatim@25"):
            score = {"accuracy": rng.uniform(0, 0.3), "loss": rng.uniform(3, 6), "guessing": 0.5}
            result = {
                "held_out_loss": rng.gauss(4.2, 0.1),
                "recall": {kind: {"32": score, "128": score} for kind in RECALL_KINDS},
                "gains": {name: {"gain": rng.uniform(0, 1)} for name in GAINS},
            }
            if text != "before":
                result["tokens"] = 1_000_000
            put(folder, f"paraphrase/{model}/{text}/0", result)
    for cell in Recall(scale, Console(quiet=True), Path("work")).cells():
        asked = []
        for task in map(asdict, scale.recall.asked(cell.name.split("/")[2])):
            accuracy = min(1.0, max(0.0, rng.gauss(0.7, 0.1)))
            asked.append(
                {
                    "length": task["length"],
                    "pairs": task["pairs"],
                    "guessing": 0.5,
                    "accuracy": dict.fromkeys(PLACES, accuracy),
                    "probes": {memories: accuracy * (memories != "none") for memories in MEMORIES},
                }
            )
        lessons = [
            {
                "pairs": n,
                "length": 6 * n or 24,
                "steps": rng.randint(20, 40),
                "loss": 0.2,
                "learnt_after": rng.choice([None, 20, 33]),
            }
            for n in (0, *cell.config["run"]["lessons"])
        ]
        put(folder, cell.name, {"asked": asked, "lessons": lessons, "taught": 120}, cell.config)


def _efficiency(folder: Path, scale: Scale, rng: random.Random) -> None:
    for protocol in ("cpu",) if scale.name in ("tiny", "cpu") else ("paper", "best"):
        for precision in PROTOCOLS[protocol].precisions:
            for kind in KINDS:
                lengths = scale.efficiency_lengths if kind == "inference" else scale.efficiency_training_lengths
                for model in MODELS:
                    speed = rng.uniform(0.7, 2.2) * (3 if kind == "training" else 1)
                    growth = 1.05 if model in ("MaBERT", "MMMMMMMMMMMM", "Longformer") else rng.uniform(1.2, 1.7)
                    for length in lengths:
                        cell = efficiency_cell(scale, protocol, precision, kind, model, length)
                        milliseconds = 60 * speed * (length / 128) ** growth
                        memory = int((450 + 0.12 * length * speed * (length / 128) ** (growth - 1)) * 2**20)
                        result: dict[str, Any] = {
                            "median_ms": milliseconds,
                            "samples_ms": [milliseconds * rng.gauss(1, 0.03) for _ in range(5)],
                            "repetitions": 5,
                            "warm_up": 1,
                            "peak_resident_bytes" if protocol == "cpu" else "peak_gpu_bytes": memory,
                        }
                        if model == "DeBERTa" and length == max(lengths) and kind == "training":
                            result = {
                                "out_of_memory": True,
                                "memory_limit_bytes": 20 * 2**30,
                                "time_limit_seconds": 720,
                            }
                        if model == "BigBird" and length == max(lengths) and kind == "training":
                            result = {"over_time": True, "memory_limit_bytes": 20 * 2**30, "time_limit_seconds": 720}
                        put(folder, cell.name, result, cell.config)
