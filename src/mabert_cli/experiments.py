"""`mabert experiment`, `mabert glue`, `mabert report`: the paper's tables and figures, run and shown."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mabert_cli.console import errors, output, table
from mabert_cli.overrides import OverrideError, apply_overrides
from mabert_cli.training import DryRun, named, settings

if TYPE_CHECKING:
    from mabert.experiments.cells import Cell, CellStore
    from mabert.experiments.scales import Scale

Data = Annotated[
    Path | None,
    typer.Option(help="Folder with text/*.train.txt*, text/*.valid.txt* and glue/<task>/; without it text is made up."),
]
ScaleName = Annotated[str, typer.Option("--scale", help="tiny, cpu, mini, small or base (the paper's).")]
Results = Annotated[Path, typer.Option(help="Folder of the results, one JSON file a cell.")]
Work = Annotated[Path, typer.Option(help="Folder of what is in between: tokenised text, checkpoints.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Only cells with this at the start of a part of their name (BERT/), or like a pattern with *; repeatable."
    ),
]
MaxMinutes = Annotated[
    float | None, typer.Option(help="Stop after this long; the same command goes on from there.", min=0)
]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="Processes at a time, which share the cores unless OMP_NUM_THREADS is set; default: one a core "
        "(4 at most), with a GPU one.",
        min=1,
    ),
]
Helper = Annotated[bool, typer.Option("--helper", hidden=True)]


def experiment(
    names: Annotated[
        list[str],
        typer.Argument(
            help="patterns, budgets, ablations, pooling, drift, efficiency, baselines, directions, transpoints, "
            "hybrids, recall, paraphrase or all; then changes to the scale.",
            metavar="NAME… KEY=VALUE…",
        ),
    ],
    scale: ScaleName = "tiny",
    data: Data = None,
    results: Results = Path("runs/results"),
    work: Work = Path("runs/work"),
    only: Only = None,
    max_minutes: MaxMinutes = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    helper: Helper = False,
) -> None:
    """Run the paper's experiments at a scale. Finished cells are kept; the same command goes on where it was stopped.

    Table 1 is patterns, Table 2 and Figure 3 budgets, Table 3 ablations, B4 pooling, Figure 5 efficiency; transpoints
    is TransMamba's; hybrids, recall and paraphrase are about memory.
    [bold]mabert report[/] shows what was found.

    Example: [bold]mabert experiment patterns drift --scale tiny --max-minutes 10[/]
    """
    from mabert.experiments.catalogue import EXPERIMENTS, Suite, cells_of
    from mabert.experiments.cells import CellStore, matching
    from mabert.experiments.finetuning import Finetuning
    from mabert.experiments.pretraining import Pretraining
    from mabert.experiments.sources import Sources

    wanted = [name for name in names if "=" not in name]
    if not wanted:
        raise OverrideError(f"Name one or more experiments: {', '.join(EXPERIMENTS)}.")
    for name in wanted:
        named(EXPERIMENTS, name, "experiment")
    chosen = resized(scale, [name for name in names if "=" in name])
    store = CellStore(results / chosen.name, work / chosen.name)
    sources = Sources(chosen, store.work, data)
    suite = Suite(chosen, Pretraining(sources, store.work, errors), Finetuning(sources, store, errors))
    cells = matching(cells_of(wanted, suite), only or ())
    if dry_run:
        show(chosen, cells, store)
        return
    compute(cells, store, max_minutes, jobs, helper)


def glue(
    models: Annotated[list[str], typer.Argument(help="Model folders, then changes to the scale.", metavar="MODEL…")],
    data: Annotated[Path, typer.Option(help="Folder that holds glue/<task>/ in the official layout.")],
    scale: ScaleName = "base",
    results: Results = Path("runs/glue/results"),
    work: Work = Path("runs/glue/work"),
    only: Only = None,
    max_minutes: MaxMinutes = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    helper: Helper = False,
) -> None:
    """Fine-tune models on the GLUE tasks with several seeds each, hyperparameters chosen on a part of train.

    The scale names tasks, seeds and grid: tasks=CoLA,RTE finetuning_seeds=3 learning_rates=2e-5,5e-5 change them. Of
    several models the first is compared with each other one, seed by seed. Finished runs are kept.

    Example: [bold]mabert glue runs/tiny runs/other --data data --scale tiny tasks=CoLA,RTE[/]
    """
    from mabert.experiments.cells import CellStore, matching
    from mabert.experiments.finetuning import Finetuning
    from mabert.experiments.glue import about_scores, checkpoints_of, glue_cells, score_table
    from mabert.experiments.sources import Sources

    chosen = resized(scale, [name for name in models if "=" in name])
    store = CellStore(results, work)
    finetuning = Finetuning(Sources(chosen, work, data), store, errors)
    checkpoints = checkpoints_of([Path(name) for name in models if "=" not in name])
    cells = glue_cells(finetuning, checkpoints)
    asked = matching(cells, only or ())
    if dry_run:
        show(chosen, asked, store)
        return
    compute(asked, store, max_minutes, jobs, helper)
    if not helper and all(map(store.is_finished, cells)):
        header, *rows = score_table(finetuning, checkpoints)
        grid = Table(*header, box=None, pad_edge=False)
        for row in rows:
            grid.add_row(*map(escape, row))
        output.print(grid)
        output.print(about_scores(finetuning, checkpoints), highlight=False)


def report(
    results: Results = Path("runs/results"),
    target: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Render the results of experiments as one page with tables and plots, ours beside the published ones.

    Example: [bold]mabert report --output report.html[/]
    """
    from mabert.experiments.report import write_report

    output.print(f"{escape(str(write_report(results, target)))}: open it in a browser")


def resized(name: str, assignments: list[str]) -> "Scale":
    """The scale of that name, with its fields changed."""
    from mabert.experiments.scales import SCALES

    return apply_overrides(named(SCALES, name, "scale")(), assignments, {"name": "is the scale's own"})


def show(scale: "Scale", cells: list["Cell"], store: "CellStore") -> None:
    """What would be done."""
    output.print(settings(scale), "")
    finished = sum(store.is_finished(cell) for cell in cells)
    output.print(table("Cells", [(kind, count) for kind, count in kinds(cells)]), "")
    output.print(f"{len(cells)} cells, {finished} of them finished, in {store.results}", highlight=False)


def kinds(cells: list["Cell"]) -> Iterator[tuple[str, int]]:
    """How many cells there are of each kind."""
    names = [cell.name.partition("/")[0] for cell in cells]
    for kind in dict.fromkeys(names):
        yield kind, names.count(kind)


def compute(
    cells: list["Cell"],
    store: "CellStore",
    max_minutes: float | None,
    jobs: int | None,
    helper: bool,
) -> None:
    """Run the cells in this process and its helpers."""
    import torch

    from mabert.experiments.cells import CellsFailedError, ExperimentStoppedError, run_cells
    from mabert.training.callbacks import TrainingInterruptedError

    cores = os.cpu_count() or 1
    # on Windows no lock keeps two processes from one cell
    one = torch.accelerator.is_available() or sys.platform == "win32"
    jobs = jobs or (1 if one else min(cores, 4))
    if not torch.accelerator.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // jobs))
    try:
        with helpers(0 if helper else jobs - 1, store.work, jobs):
            minutes = None if helper else max_minutes  # the first process ends its helpers
            run_cells(cells, store, max_minutes=minutes, include_alone=not helper, console=errors)
    except CellsFailedError as failure:
        errors.print(f"[bold red]Error:[/] [red]{escape(str(failure))}[/]", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from failure
    except (ExperimentStoppedError, TrainingInterruptedError) as stop:
        errors.print(str(stop), soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(128 + stop.signum if stop.signum else 0) from stop


@contextmanager
def helpers(count: int, work: Path, jobs: int) -> Iterator[None]:
    """The same command in further processes, which take what nobody is at; their output goes to files in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    for number in range(1, count + 1):
        with (work / f"helper-{number}.log").open("ab") as log:
            command = [sys.executable, "-m", "mabert_cli", *sys.argv[1:], "--helper", "--jobs", str(jobs)]
            # a session of its own: Ctrl-C reaches a helper once, through this process
            running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
