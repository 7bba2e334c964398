"""What fine-tuning was run with: the point of the grid that each model and task was given."""

from mabert.experiments.report.captions import at_scale
from mabert.experiments.report.collect import Record, Results
from mabert.experiments.report.markup import DASH, Column, Entry, Row, Section, Table


def grid(results: Results) -> Section | None:
    """One row a model, one column a task."""
    cells = results.of("tuning")
    if not cells:
        return None
    tasks = list(dict.fromkeys([*(score.task for score in results.scores()), *sorted(task for *_, task in cells)]))
    models = sorted({model for model, *_ in cells})
    rows = []
    for model in models:
        entries = []
        for task in tasks:
            chosen = dict.fromkeys(
                _point(record) for name, record in cells.items() if (name[0], name[-1]) == (model, task)
            )
            entries.append(Entry("; ".join(chosen) or DASH))
        rows.append(Row(model, entries))
    some = next(iter(cells.values()))
    points = " | ".join(_written(point) for point in some.config["grid"])
    how = (
        "the best of these on a part of train, dev unread"
        if len(some.config["grid"]) > 1
        else "the only point there is"
    )
    caption = f"Learning rate, batch size, epochs: {how}: {points}. {at_scale(results)}."
    wanted = ["/".join(("tuning", *name)) for name in cells]
    table = Table("Hyperparameters of fine-tuning", caption, [Column(task) for task in tasks], rows, wanted)
    return Section("grid", "Fine-tuning grid", [table])


def _point(record: Record) -> str:
    return _written(record.at("choice"))


def _written(point: dict) -> str:
    return f"{point['learning_rate']:g}, {point['batch_size']}, {point['epochs']}"
