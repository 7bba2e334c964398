"""A small MaBERT and its Transformer twin on real text, side by side on a CPU: learning curves, then four GLUE tasks.

    python -m benchmarks.pretraining --text DIR --glue DIR --work runs/cpu --steps 6000

Every command is one that a user would type; what has finished is not run again and what was stopped goes on, so the
same line resumes it. Two commands at a time, one thread each. The result is results/pretraining-cpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import stamp
from rich.console import Console

from mabert.files import atomic_write

MODELS = {"MaBERT": ["model.pattern=MMT"], "Transformer": ["model.pattern=T"]}
TASKS = {"CoLA": 3, "SST-2": 1, "MRPC": 3, "RTE": 3}  # epochs
SEEDS = range(3)
# Not tuned: the paper is silent, and a model this small takes larger steps than BERT's 2e-5.
LEARNING_RATE = 3e-4
RESULT = Path("results/pretraining-cpu.json")
console = Console()


def mabert(*arguments: object, log: Path) -> list[str]:
    """Run one command of mabert's on one thread; returns it as a user would type it."""
    command = [str(argument) for argument in arguments]
    console.print(f"[{time.strftime('%H:%M:%S')}] mabert {' '.join(command)}", highlight=False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        subprocess.run(
            [Path(sys.executable).with_name("mabert"), *command],
            check=True,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return command


def pretrain(name: str, arguments: argparse.Namespace) -> None:
    """One of the models; the shards of tokenised text are shared."""
    folder = arguments.work / name
    if (folder / "metrics.json").exists():
        return
    text = arguments.text
    mabert(
        "pretrain",
        "tiny",
        f"train={text}/enwiki2015.train.txt.xz,{text}/classic_books.train.txt.xz",
        f"valid={text}/enwiki2015.valid.txt.xz,{text}/classic_books.valid.txt.xz",
        f"tokenizer={arguments.work}/tokenizer",
        f"shards={arguments.work}/shards",
        *MODELS[name],
        f"output={folder}",
        f"steps={arguments.steps}",
        "bf16=true",
        "workers=0",
        "eval_every=250",
        "checkpoint_every=250",
        log=arguments.work / f"{name}.log",
    )


def finetune(name: str, task: str, seed: int, arguments: argparse.Namespace) -> None:
    """One task, one seed."""
    folder = arguments.work / f"{name}-{task}-{seed}"
    if (folder / "metrics.json").exists():
        return
    mabert(
        "finetune",
        "glue",
        f"task={task}",
        f"glue={arguments.glue}",
        f"model={arguments.work / name}",
        f"output={folder}",
        f"epochs={TASKS[task]}",
        f"learning_rate={LEARNING_RATE}",
        f"seed={seed}",
        log=arguments.work / "finetune.log",
    )


def collect(arguments: argparse.Namespace) -> dict:
    """Everything that the page shows, in one object without paths of this machine."""

    def read(path: Path) -> dict:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in ("config", "output")}

    models = {}
    for name, options in MODELS.items():
        folder = arguments.work / name
        config = json.loads((folder / "pretrain_config.json").read_text(encoding="utf-8"))
        lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        models[name] = {
            "options": options,
            "pretrain": read(folder / "metrics.json"),
            "config": {key: config[key] for key in config.keys() - {"train", "valid", "tokenizer", "output", "shards"}},
            "evaluations": [json.loads(line) for line in lines],
            "finetune": {
                task: [read(arguments.work / f"{name}-{task}-{seed}" / "metrics.json") for seed in SEEDS]
                for task in TASKS
            },
        }
    return {"stamp": stamp(), "epochs": TASKS, "learning_rate": LEARNING_RATE, "models": models}


def main() -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with enwiki2015.* and classic_books.*")
    parser.add_argument("--glue", type=Path, required=True, help="folder in the official GLUE layout")
    parser.add_argument("--work", type=Path, default=Path("runs/cpu"), help="where the runs go")
    parser.add_argument("--steps", type=int, required=True, help="of pretraining, the same for all")
    arguments = parser.parse_args()

    if not (arguments.work / "tokenizer").exists():
        mabert(
            "tokenizer",
            arguments.text / "enwiki2015.train.txt.xz",
            arguments.text / "classic_books.train.txt.xz",
            "--output",
            arguments.work / "tokenizer",
            "--vocab-size",
            16000,
            log=arguments.work / "tokenizer.log",
        )
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pretrain, "MaBERT", arguments)
        while not first.done() and len(list((arguments.work / "shards").rglob("manifest.json"))) < 2:
            time.sleep(5)  # the first one writes the shards of training and held-out text, the second one reads them
        for future in [first, *(pool.submit(pretrain, name, arguments) for name in list(MODELS)[1:])]:
            future.result()
        jobs = [
            pool.submit(finetune, name, task, seed, arguments) for task in TASKS for seed in SEEDS for name in MODELS
        ]
        for job in jobs:
            job.result()
    RESULT.parent.mkdir(exist_ok=True)
    with atomic_write(RESULT, "w") as file:
        json.dump(collect(arguments), file, indent=1)
    console.print(f"wrote {RESULT}; render it with `make results`")


if __name__ == "__main__":
    main()
