"""What pretraining left: loss curves, held-out loss and masked accuracy, sizes."""

from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.report.captions import matched, pretraining_seeds
from mabert.experiments.report.collect import Measured, Models, Record, Results
from mabert.experiments.report.markup import Column, Entry, Figure, Panel, Row, Table, entry
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.styles import key, style

HARDLY_LEARNT = 0.9  # of the unigram entropy


def first_length(results: Results) -> int:
    """Tokens in the rows that every evaluation reads: those of the first stage."""
    for record in results.of("pretraining").values():
        return int(record.at("held_out")[0]["length"])
    return results.scale.stage_lengths[0]


def held_out(results: Results, model: str, what: str, length: int | None = None) -> Measured:
    """A model's "loss", "accuracy" or other number of `HeldOut` on rows of a length, by default the first."""

    tokens = length or first_length(results)

    def value(record: Record) -> float:
        for row in record.at("held_out"):
            if row["length"] == tokens:
                return float(row[what])
        raise ValueError(f"{record.path}: nothing was held out in rows of {tokens} tokens, as it was for other models.")

    return results.measure(results.pretrainings(model), value)


def parameters(results: Results, model: str, what: str = "parameters") -> Measured:
    """A model's parameters in millions, which are the same for all seeds."""
    names = results.pretrainings(model)
    found = [name for name in names if name in results.records]
    return results.measure((found or names)[:1], lambda record: record.at(what) / 1e6)


def pretraining_table(results: Results, models: Models) -> Table:
    """Size, held-out loss and masked accuracy of each model."""
    names = [name for _, model in models for name in results.pretrainings(model)]
    found = results.found(names)
    entropies = {row["length"]: row["unigram_entropy"] for record in found for row in record.at("held_out")}
    lengths = sorted(entropies)
    columns = [Column("parameters", ("millions",)), Column("of the layers", ("millions",))]
    for length in lengths:
        columns.append(Column("held-out loss", ("nats", f"rows of {length}"), "low"))
        columns.append(Column("masked accuracy", (f"rows of {length}",), "high"))
    rows = []
    for label, model in models:
        entries = [entry(parameters(results, model, what), ".2f") for what in ("parameters", "encoder_parameters")]
        for length in lengths:
            entries.append(entry(held_out(results, model, "loss", length)))
            entries.append(entry(held_out(results, model, "accuracy", length), ".1%"))
        rows.append(Row(label, entries))
    by_chance = [Entry(), Entry()]
    for length in lengths:
        by_chance += [Entry(f"{entropies[length]:.3f}"), Entry()]
    rows.append(Row("unigram entropy", by_chance, "baseline"))
    cells = [model for _, model in models]
    caption = f"{pretraining_seeds(results, cells)} {matched(results, cells)}"
    title = "Masked language modelling on held-out text"
    return Table(title, caption, columns, rows, names, _remarks(results, models))


def _remarks(results: Results, models: Models) -> list[str]:
    remarks = []

    def has_hardly_learnt(model: str) -> bool:
        losses = held_out(results, model, "loss")
        entropy = held_out(results, model, "unigram_entropy")
        return bool(losses.values) and min(losses.values) > HARDLY_LEARNT * min(entropy.values)

    if stuck := [label for label, model in models if has_hardly_learnt(model)]:
        remarks.append(
            f"Still within a tenth of the unigram entropy: {', '.join(stuck)}. To set them beside a model that learnt "
            "compares learning with not learning, not two architectures at their best."
        )
    return remarks


def loss_figure(results: Results, name: str, models: Models) -> Figure:
    """Held-out loss against the tokens read."""
    length = first_length(results)
    series, legend, entropy = [], [], 0.0
    for label, model in models:
        curves: dict[float, list[float]] = {}
        for record in results.found(results.pretrainings(model)):
            for point in record.at("evaluations"):
                if point["length"] == length:
                    curves.setdefault(tokens_at(record, point["step"]) / 1e6, []).append(point["loss"])
                    entropy = point["unigram_entropy"]
        if curves:
            means, spreads = zip(*(mean_and_spread(losses) for losses in curves.values()), strict=True)
            series.append(Series(label, style(model), list(curves), means, spreads))
            legend.append((label, style(model)))
    svg = plot(
        f"{results.scale.name}-{name}-loss",
        "Held-out loss against the tokens read, one line a model",
        series,
        Axis("tokens read (millions)"),
        Axis(f"held-out loss, rows of {length} (nats)"),
        bands=True,
        level=("unigram entropy", entropy) if series else None,
    )
    caption = (
        "The dashed line is the best that a predictor without context can do. "
        f"{pretraining_seeds(results, [model for _, model in models])}"
    )
    wanted = [name for _, model in models for name in results.pretrainings(model)]
    return Figure("Held-out loss while pretraining", caption, key(legend), [Panel("", svg)], wanted)


def tokens_at(record: Record, step: int) -> float:
    """Tokens read after so many optimizer steps, of rows that grow from stage to stage."""
    config, steps = record.config, record.at("steps")
    read = begin = 0.0
    for length, fraction in zip(config["stage_lengths"], config["stage_fractions"], strict=True):
        read += length * min(max(step - begin, 0.0), fraction * steps)
        begin += fraction * steps
    return read * config["batch_size"]
