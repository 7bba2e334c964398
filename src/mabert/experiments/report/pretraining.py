"""Models after equal tokens: loss curves, held-out loss, tasks. The baselines, and the scan directions."""

from collections.abc import Sequence

from mabert.experiments.architectures import BASELINES, MABERTS
from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.report.captions import matched, seeds
from mabert.experiments.report.collect import Measured, Record, Results
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
    """A model's "loss", "masked_accuracy" or other number of `HeldOut` on rows of a length, by default the first."""

    def value(record: Record) -> float:
        found = {row["length"]: row[what] for row in record.at("held_out")}
        return float(found[length or first_length(results)])

    return results.measure(results.pretrainings(model), value)


def parameters(results: Results, model: str, what: str = "parameters") -> Measured:
    """A model's parameters in millions, those of any seed."""
    seeds_found = [name for name in results.pretrainings(model) if name in results.records]
    return results.measure(seeds_found[:1] or results.pretrainings(model)[:1], lambda record: record.at(what) / 1e6)


def pretraining_table(results: Results, models: Sequence[str]) -> Table:
    """Size, held-out loss and masked accuracy of each model."""
    found = [record for model in models for record in results.found(results.pretrainings(model))]
    lengths = sorted({row["length"] for record in found for row in record.at("held_out")})
    columns = [Column("parameters", ("millions",)), Column("in the encoder", ("millions", "no embeddings"))]
    for length in lengths:
        columns.append(Column("held-out loss", ("nats", f"rows of {length}"), "low"))
        columns.append(Column("masked accuracy", (f"rows of {length}",), "high"))
    rows = []
    for model in models:
        entries = [entry(parameters(results, model, what), ".2f") for what in ("parameters", "encoder_parameters")]
        for length in lengths:
            entries.append(entry(held_out(results, model, "loss", length)))
            entries.append(entry(held_out(results, model, "masked_accuracy", length), ".1%"))
        rows.append(Row(model, entries))
    entropies = [
        row["unigram_entropy"] for length in lengths for row in found[0].at("held_out") if row["length"] == length
    ]
    rows.append(
        Row(
            "unigram entropy",
            [Entry(), Entry(), *(e for h in entropies for e in (Entry(f"{h:.3f}"), Entry()))],
            "baseline",
        )
    )
    wanted = [name for model in models for name in results.pretrainings(model)]
    caption = f"{seeds(results, models)} {matched(results, models)}"
    return Table("Masked language modelling, held out", caption, columns, rows, wanted, _remarks(results, models))


def _remarks(results: Results, models: Sequence[str]) -> list[str]:
    remarks = []
    if "ALBERT" in models and results.scale.match_parameters:
        remarks.append(
            "ALBERT shares its layers: it is as wide as the others, and its parameters count once for each layer."
        )
    stuck = [
        model
        for model in models
        if (loss := held_out(results, model, "loss")).is_complete
        and mean_and_spread(loss.values)[0]
        > HARDLY_LEARNT * mean_and_spread(held_out(results, model, "unigram_entropy").values)[0]
    ]
    if stuck:
        remarks.append(
            f"Still within a tenth of the unigram entropy: {', '.join(stuck)}. Compared with these, a model that learnt is "
            "set beside one that hardly did, not two architectures at their best."
        )
    return remarks


def loss_figure(results: Results, title: str, identity: str, models: Sequence[str]) -> Figure:
    """Held-out loss against the tokens read."""
    length = first_length(results)
    series, entropy = [], 0.0
    shown = [model for model in models if results.found(results.pretrainings(model))]
    for model in shown:
        curves: dict[float, list[float]] = {}
        for record in results.found(results.pretrainings(model)):
            for point in record.at("evaluations"):
                if point["length"] == length:
                    curves.setdefault(tokens_at(record, point["step"]) / 1e6, []).append(point["loss"])
                    entropy = point["unigram_entropy"]
        statistics = [mean_and_spread(losses) for losses in curves.values()]
        look = replace(style(model), marker="")
        series.append(Series(model, look, list(curves), [m for m, _ in statistics], [s for _, s in statistics]))
    svg = plot(
        f"{results.scale.name}-{identity}-loss",
        "Held-out loss against tokens, one line a model",
        series,
        Axis("tokens (millions)"),
        Axis(f"held-out loss, rows of {length} (nats)"),
        bands=True,
        level=("unigram entropy", entropy),
    )
    caption = f"The dashed line is what the best predictor without context reaches. {seeds(results, models)}"
    wanted = [name for model in models for name in results.pretrainings(model)]
    return Figure(title, caption, key((m, replace(style(m), marker="")) for m in shown), [Panel("", svg)], wanted)


def tokens_at(record: Record, step: int) -> float:
    """Tokens read after so many optimizer steps, of rows that grow from stage to stage."""
    config, steps = record.config, record.at("steps")
    read, begin = 0.0, 0.0
    for length, fraction in zip(config["stage_lengths"], config["stage_fractions"], strict=True):
        read += length * min(max(step - begin, 0.0), fraction * steps)
        begin += fraction * steps
    return read * config["batch_size"]
