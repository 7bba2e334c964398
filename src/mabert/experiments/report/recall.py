"""Hybrids: what they recall, by length and place, and through which memory; and their loss as language models."""

from collections.abc import Callable

from mabert.data.recall import PLACES
from mabert.experiments.causal_architectures import HYBRIDS
from mabert.experiments.report.captions import at_scale, counted
from mabert.experiments.report.collect import Record, Results
from mabert.experiments.report.markup import Column, Entry, Figure, Panel, Row, Section, Table, entry
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.styles import key, style
from mabert.models.causal import MEMORIES

ABOUT = (
    "Attention and a state space (Mamba-2) one after the other in a layer, or side by side and fused, beside each "
    "alone: as many mixers in all (half the layers where a layer has two), and as many parameters outside the "
    "embeddings. Of the paper (arXiv 2510.26912) its abstract is known to us, not its sizes, tasks or numbers: these "
    "settings are ours. It finds sequential hybrids better on shorter contexts, parallel ones on longer, and fusion by "
    "attention to recall best. What was found here stands below the figure."
)
PROBES = {
    "both": "as it is",
    "recurrent-only": "recurrent only",
    "attention-only": "attention only",
    "none": "neither",
}
assert PROBES.keys() == MEMORIES.keys()


def hybrids(results: Results) -> Section | None:
    """Loss as language models, then recall."""
    blocks: list[Table | Figure] = []
    trained = {model for model, _ in results.of("causal")}
    if trained & (HYBRIDS.keys() - {"Transformer", "Mamba-2"}):
        blocks.append(_loss_table(results))
    kinds = dict.fromkeys(kind for _, kind, _, _ in results.of("recall"))
    for kind in kinds:
        blocks += [_length_figure(results, kind), _place_table(results, kind), _probe_table(results, kind)]
    return Section("hybrids", "Hybrids and recall", blocks, ABOUT) if blocks else None


def _loss_table(results: Results) -> Table:
    seeds = sorted({int(seed) for _, seed in results.of("causal")})
    rows, wanted = [], []
    for model in HYBRIDS:
        cells = [f"causal/{model}/{seed}" for seed in seeds]
        wanted += cells
        loss = results.measure(cells, lambda record: record.at("held_out")[0]["loss"])
        accuracy = results.measure(cells, lambda record: record.at("held_out")[0]["accuracy"])
        layers = results.measure(cells[:1], lambda record: record.at("encoder_parameters") / 1e6)
        rows.append(Row(model, [entry(loss), entry(accuracy, ".1%"), entry(layers, ".2f")]))
    tokens = sorted({int(record.at("tokens")) for record in results.of("causal").values()})
    columns = [
        Column("held-out loss", ("nats a token",), "low"),
        Column("accuracy", ("of the next token",), "high"),
        Column("parameters", ("of the layers, millions",)),
    ]
    caption = (
        f"{at_scale(results)}; {' or '.join(f'{n:,}' for n in tokens)} tokens; "
        f"{counted([len(seeds)], 'pretraining seed')}."
    )
    return Table("Hybrids as language models", caption, columns, rows, wanted)


def _lengths(results: Results, kind: str) -> list[int]:
    return sorted({int(length) for _, of, length, _ in results.of("recall") if of == kind})


def _cells(results: Results, model: str, kind: str, length: int) -> list[str]:
    seeds = sorted({int(seed) for _, of, _, seed in results.of("recall") if of == kind})
    return [f"recall/{model}/{kind}/{length}/{seed}" for seed in seeds]


def _wanted(results: Results, kind: str) -> list[str]:
    return [
        name for model in HYBRIDS for length in _lengths(results, kind) for name in _cells(results, model, kind, length)
    ]


def _about(results: Results, kind: str) -> str:
    records = results.found(_wanted(results, kind))
    tasks = {(record.config["task"]["length"], record.config["task"]["pairs"]) for record in records}
    facts = ", ".join(f"{pairs} in {length:,} tokens" for length, pairs in sorted(tasks))
    steps = sorted({record.config["run"]["steps"] for record in records})
    rows = sorted({record.config["eval_rows"] for record in records})
    seeds = len({name[3] for name in results.of("recall") if name[1] == kind})
    return (
        f"{at_scale(results)}; facts: {facts}; {' or '.join(f'{n:,}' for n in steps)} steps; share of answers that are "
        f"right in all tokens, on {' or '.join(f'{n:,}' for n in rows)} rows; {counted([seeds], 'seed')}."
    )


def _length_figure(results: Results, kind: str) -> Figure:
    lengths = _lengths(results, kind)
    series = []
    for model in HYBRIDS:
        found = {}
        for length in lengths:
            measured = results.measure(
                _cells(results, model, kind, length), lambda record: record.at("accuracy", "spread")
            )
            if measured.is_complete:
                found[float(length)] = measured.mean_and_spread
        means, spreads = [mean for mean, _ in found.values()], [spread for _, spread in found.values()]
        series.append(Series(model, style(model), list(found), means, spreads))
    svg = plot(
        f"{results.scale.name}-recall-{kind}",
        f"Recall of {kind} by length of the row, one line an architecture",
        series,
        Axis("tokens in the row", "log", lengths),
        Axis("answers that are right"),
    )
    caption = f"Facts anywhere in the row. {_about(results, kind)} Bars: ± standard deviation over the seeds."
    legend = key((model, style(model)) for model in HYBRIDS)
    notes = _findings(results, kind)
    return Figure(f"Recall by length · {kind}", caption, legend, [Panel("", svg)], _wanted(results, kind), notes)


def _findings(results: Results, kind: str) -> list[str]:
    """Which family of hybrids recalls better at each length, from the numbers."""
    said: list[str] = []
    families = {
        "sequential": [name for name in HYBRIDS if name.startswith("sequential")],
        "parallel": [name for name in HYBRIDS if name.startswith("parallel")],
    }
    for length in _lengths(results, kind):
        best: dict[str, tuple[str, float, float]] = {}
        for family, models in families.items():
            for model in models:
                cells = _cells(results, model, kind, length)
                measured = results.measure(cells, lambda record: record.at("accuracy", "spread"))
                if not measured.is_complete:
                    return said
                mean, spread = measured.mean_and_spread
                if family not in best or mean > best[family][1]:
                    best[family] = (model, mean, spread or 0.0)
        (one, first, spread), (other, second, beside) = best["sequential"], best["parallel"]
        numbers = (
            f"At {length:,} tokens the best of 2 sequential ones ({one}) recalls {first:.1%}, the best of "
            f"{len(families['parallel'])} parallel ones ({other}) {second:.1%}, each chosen on the same rows"
        )
        if len({name[3] for name in results.of("recall") if name[1] == kind}) == 1:
            said.append(f"{numbers}; of one seed each, which says little.")
        elif abs(first - second) <= spread + beside or abs(first - second) < 0.01:
            said.append(f"{numbers}: no difference beyond the deviation of the seeds, or one in a hundred.")
        else:
            said.append(f"{numbers}: the {'sequential' if first > second else 'parallel'} one is better.")
    return said


def _place_table(results: Results, kind: str) -> Table:
    def by_place(place: str) -> Callable[[Record], float]:
        return lambda record: record.at("accuracy", place)

    return _table(results, kind, f"Recall by place of the facts · {kind}", {place: by_place(place) for place in PLACES})


def _probe_table(results: Results, kind: str) -> Table:
    def by_probe(memories: str) -> Callable[[Record], float]:
        return lambda record: record.at("probes", memories)

    values = {title: by_probe(memories) for memories, title in PROBES.items()}
    about = (
        "What may pass from the facts to the questions: everything, what the states hold, what attention reaches, or "
        "nothing. Models were trained with both."
    )
    return _table(results, kind, f"Recall through each memory · {kind}", values, about)


def _table(
    results: Results, kind: str, title: str, values: dict[str, Callable[[Record], float]], about: str = ""
) -> Table:
    lengths = _lengths(results, kind)
    columns = [Column(f"{length:,}", (what,), "high") for length in lengths for what in values]
    rows = []
    for model in HYBRIDS:
        entries: list[Entry] = []
        for length in lengths:
            cells = _cells(results, model, kind, length)
            entries += [entry(results.measure(cells, value), ".1%") for value in values.values()]
        rows.append(Row(model, entries))
    caption = " ".join(filter(None, (about, _about(results, kind))))
    return Table(title, caption, columns, rows, _wanted(results, kind))
