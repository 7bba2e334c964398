"""TransMamba: loss by schedule and beside the references, time by length, cost of a layer by TransPoint."""

from collections.abc import Iterable, Sequence

from mabert.causal_config import TRANSPOINT_LENGTH, TRANSPOINTS, TransMambaConfig
from mabert.experiments.causal_architectures import CAUSAL_REFERENCES, causal_architecture, transmamba_name
from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.published import published
from mabert.experiments.report.captions import at_scale, counted
from mabert.experiments.report.collect import Record, Results
from mabert.experiments.report.efficiency import failure
from mabert.experiments.report.markup import DASH, Column, Entry, Figure, Panel, Row, Section, Table, entry
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.pretraining import tokens_at
from mabert.experiments.report.styles import Style, key, style
from mabert.experiments.scales import CausalScale
from mabert.experiments.transpoints import MAIN, layer_cells, mixer_flops, models_of

LOSSES, TIMES = "transmamba_table6_validation_loss", "transmamba_table5_relative_training_time"
PUBLISHED_ON = f"Published: {published()['_notes']['transmamba']}."
ABOUT = (
    "TransMamba's layers pass from attention to a state space at a token position, their TransPoint, by the same "
    "weights. References have as many parameters outside the embeddings, by the width of their feed-forward networks; "
    "all read the same rows, of one sequence each, for as many tokens, by the same recipe. Schedules keep the shares "
    "of the sequence that the paper has at 8,192 tokens."
)


def transpoints(results: Results) -> Section | None:
    """Everything there is of it."""
    blocks: list[Table | Figure] = []
    if _trained_cells(results):
        blocks += [_loss_figure(results), _loss_table(results)]
    for precision in dict.fromkeys(name[0] for kind in ("causal-step", "causal-layer") for name in results.of(kind)):
        if any(name[0] == precision for name in results.of("causal-step")):
            blocks.append(_time_table(results, precision))
        if any(name[0] == precision for name in results.of("causal-layer")):
            blocks.append(_layer_figure(results, precision))
    return Section("transpoints", "TransMamba", blocks, ABOUT) if blocks else None


def _models() -> list[str]:
    return [*CAUSAL_REFERENCES, *map(transmamba_name, TRANSPOINTS)]


def _trained_cells(results: Results) -> dict[tuple[str, ...], Record]:
    """Of TransMamba and its references: others are trained by the same recipe as well."""
    return {name: record for name, record in results.of("causal").items() if name[0] in _models()}


def _seeds(results: Results) -> list[int]:
    return sorted({int(seed) for _, seed in _trained_cells(results)} | set(range(results.scale.causal.seeds)))


def _cells(results: Results, model: str) -> list[str]:
    return [f"causal/{model}/{seed}" for seed in _seeds(results)]


def _asked_for(results: Results, found: Iterable[str]) -> list[str]:
    """The models of the scale, whether or not there is anything of them, and those that there is something of."""
    wanted = {*models_of(results.scale.causal), *found}
    return [model for model in _models() if model in wanted]


def _about(results: Results) -> str:
    tokens = sorted({int(record.at("tokens")) for record in _trained_cells(results).values()})
    lengths = sorted({record.at("held_out")[0]["length"] for record in _trained_cells(results).values()})
    seeds = len(_seeds(results))
    spread = ", mean ± sample standard deviation" if seeds > 1 else ""
    return (
        f"{at_scale(results)}; rows of {' or '.join(f'{n:,}' for n in lengths)} tokens, "
        f"{' or '.join(f'{n:,}' for n in tokens)} in all; {counted([seeds], 'pretraining seed')}{spread}."
    )


def _loss_figure(results: Results) -> Figure:
    """Held-out loss against the tokens read; of the schedules only the paper's last, V9."""
    series, entropy = [], 0.0
    for model in MAIN:
        curves: dict[float, list[float]] = {}
        for record in results.found(_cells(results, model)):
            for point in record.at("evaluations"):
                curves.setdefault(tokens_at(record, point["step"]) / 1e6, []).append(point["loss"])
                entropy = point["unigram_entropy"]
        if curves:
            means, spreads = zip(*(mean_and_spread(losses) for losses in curves.values()), strict=True)
            series.append(Series(model, style(model), list(curves), means, spreads))
    svg = plot(
        f"{results.scale.name}-transpoints-loss",
        "Held-out loss against the tokens read, one line a model",
        series,
        Axis("tokens read (millions)"),
        Axis("held-out loss (nats a token)"),
        bands=True,
        level=("unigram entropy", entropy) if series else None,
    )
    caption = f"The dashed line is the best that a predictor without context can do. {_about(results)}"
    wanted = [name for model in MAIN for name in _cells(results, model)]
    legend = key((model, style(model)) for model in MAIN)
    return Figure("Next-token loss while pretraining", caption, legend, [Panel("", svg)], wanted)


def _loss_table(results: Results) -> Table:
    """Table 6."""
    rows, paper = [], published()[LOSSES]
    models = _asked_for(results, (model for model, _ in _trained_cells(results)))
    for model in models:
        cells = _cells(results, model)
        loss = results.measure(cells, lambda record: record.at("held_out")[0]["loss"])
        accuracy = results.measure(cells, lambda record: record.at("held_out")[0]["accuracy"])
        parameters = results.measure(cells[:1], lambda record: record.at("parameters") / 1e6)
        layers = results.measure(cells[:1], lambda record: record.at("encoder_parameters") / 1e6)
        rows.append(
            Row(
                _label(model),
                [entry(loss), entry(accuracy, ".1%"), entry(parameters, ".2f"), entry(layers, ".2f")],
                "ours",
            )
        )
        if model in paper:
            beside = Entry(f"{paper[model]:.3f}", value=paper[model])
            rows.append(Row(_label(model), [beside, Entry(), Entry(), Entry()], "published"))
    entropies = [record.at("held_out")[0]["unigram_entropy"] for record in _trained_cells(results).values()]
    rows.append(Row("unigram entropy", [Entry(f"{entropies[0]:.3f}"), Entry(), Entry(), Entry()], "baseline"))
    columns = [
        Column("held-out loss", ("nats a token",), "low"),
        Column("accuracy", ("of the next token",), "high"),
        Column("parameters", ("millions",)),
        Column("of the layers", ("millions",)),
    ]
    wanted = [name for model in models for name in _cells(results, model)]
    notes = [f"{PUBLISHED_ON} The perplexities printed beside the losses are not their exponentials and are left out."]
    return Table("TransMamba's Table 6 · Loss by schedule", _about(results), columns, rows, wanted, notes)


def _label(model: str) -> str:
    schedule = model.removeprefix(transmamba_name(""))
    if schedule in TRANSPOINTS:
        return f"TransMamba {schedule} {list(TRANSPOINTS[schedule])}"
    letters = CAUSAL_REFERENCES[model].letters
    return model if len(letters) == 1 else f"{model} ({letters})"


def _time_table(results: Results, precision: str) -> Table:
    """Table 5, by length."""
    cells = {name[1:]: record for name, record in results.of("causal-step").items() if name[0] == precision}
    timed = sorted({int(length) for _, length in cells} | set(results.scale.causal.timed_lengths))
    lengths = sorted({*timed, TRANSPOINT_LENGTH})
    columns = [
        column for n in lengths for column in (Column(f"{n:,}", ("ms",), "low"), Column(f"{n:,}", ("relative",), "low"))
    ]
    rows = []
    models = _asked_for(results, (model for model, _ in cells))
    for model in models:
        entries: list[Entry] = []
        for length in lengths:
            record, base = cells.get((model, str(length))), cells.get(("Transformer", str(length)))
            entries += [_time(record), _relative(record, base)]
        rows.append(Row(_label(model), entries, "ours"))
        if model in published()[TIMES]:
            beside, ratio = [Entry()] * len(columns), published()[TIMES][model]
            beside[2 * lengths.index(TRANSPOINT_LENGTH) + 1] = Entry(f"{ratio:.2f}", value=ratio)
            rows.append(Row(_label(model), beside, "published"))
    found = list(cells.values())
    caption = (
        f"One row a step, forward, backward and optimizer; {precision}; {_size(found)}; relative to the Transformer."
    )
    wanted = [f"causal-step/{precision}/{model}/{length}" for model in models for length in timed]
    title = f"TransMamba's Table 5 · Time of a training step, {precision}"
    return Table(title, caption, columns, rows, wanted, [PUBLISHED_ON])


def _time(record: Record | None) -> Entry:
    if record is None:
        return Entry(DASH)
    return failure(record) or Entry(f"{record.at('median_ms'):,.0f}", value=record.at("median_ms"))


def _relative(record: Record | None, base: Record | None) -> Entry:
    if record is None or base is None or failure(record) or failure(base):
        return Entry(DASH)
    ratio = record.at("median_ms") / base.at("median_ms")
    return Entry(f"{ratio:.2f}", value=ratio)


def _size(records: Sequence[Record]) -> str:
    size = records[0].config["size"]
    repetitions = [record.at("repetitions") for record in records if not failure(record)]
    return (
        f"{size['layers']} layers of hidden size {size['hidden_size']}, {size['num_attention_heads']} heads; medians "
        f"of {counted(repetitions, 'repetition')}"
    )


def _layer_figure(results: Results, precision: str) -> Figure:
    """Figure 4 (a): time of a layer by TransPoint, beside what its operations would make it."""
    cells = {name[1:]: record for name, record in results.of("causal-layer").items() if name[0] == precision}
    panels, notes = [], []
    wanted = dict.fromkeys(cell.name for cell in layer_cells(results.scale, precision))
    wanted |= dict.fromkeys(f"causal-layer/{precision}/{length}/{point}" for length, point in cells)
    lines = (("measured", Style("vermillion", "o", width=2.2)), ("operations counted", Style("quiet", "", (3, 1.5))))
    for length in sorted({int(length) for length, _ in cells}):
        found = {int(point): record for (of, point), record in cells.items() if int(of) == length}
        fine = {point: record for point, record in sorted(found.items()) if not failure(record)}
        if length not in fine:
            continue
        whole = fine[length].at("median_ms")
        config = causal_architecture(MAIN[0], CausalScale(**fine[length].config["size"]), longest=length)
        assert isinstance(config, TransMambaConfig)
        counted_flops = {point: sum(mixer_flops(config, length, point).values()) for point in fine}
        times = [record.at("median_ms") / whole for record in fine.values()]
        spreads = [mean_and_spread([ms / whole for ms in record.at("samples_ms")])[1] for record in fine.values()]
        operations = [counted_flops[point] / counted_flops[length] for point in fine]
        svg = plot(
            f"{results.scale.name}-transpoints-layer-{precision}-{length}",
            "Time of one mixer by TransPoint, relative to attention alone, and the operations counted",
            [
                Series("measured", lines[0][1], list(fine), times, spreads),
                Series("counted", lines[1][1], list(fine), operations),
            ],
            Axis("TransPoint (tokens)"),
            Axis("relative to attention alone"),
        )
        panels.append(Panel(f"{length:,} tokens", svg))
        best = min(fine, key=lambda point: fine[point].at("median_ms"))
        fewest = min(counted_flops, key=lambda point: counted_flops[point])
        notes.append(
            f"At {length:,} tokens the fastest of these TransPoints is {best:,} "
            f"({fine[best].at('median_ms') / whole:.2f} of attention alone); fewest operations are counted at "
            f"{fewest:,}. {published()['_notes']['transmamba_figure_4']}."
        )
    caption = (
        f"One mixer, forward and backward, {precision}; {_size(list(cells.values()))}; bars: ± standard deviation of "
        "the repetitions. Counted: multiply-adds of the projections, attention, converter and scan (forward), without "
        "what moves memory and multiplies no matrices, of which the scan has more than attention."
    )
    title = f"TransMamba's Figure 4 (a) · Cost of a layer by TransPoint, {precision}"
    return Figure(title, caption, key(lines), panels, list(wanted), notes)
