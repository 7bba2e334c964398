"""Memory and time against length: Figure 5, Tables B5 to B7 and the headline ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mabert.experiments.architectures import BASELINES
from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.efficiency import KINDS, MODELS, PROTOCOLS, Headline, headline, lengths, parameter_table
from mabert.experiments.published import published
from mabert.experiments.report.captions import NOT_COMPARABLE, counted
from mabert.experiments.report.collect import Record, Results
from mabert.experiments.report.markup import DASH, Column, Entry, Figure, Html, Panel, Row, Section, Table
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.styles import key, style

SIX = ("MaBERT", *BASELINES)
ABOUT = {
    "cpu": "On a CPU, every cell in a process of its own",
    "paper": "The paper's protocol: SDPA without FlashAttention, nothing compiled, nothing packed",
    "best": "Best of each: any attention kernel, compiled where that is faster; rows of mixed lengths, packed where "
    "the model can",
}
PUBLISHED_ON = f"Published: {published()['_notes']['efficiency_setup']}."


@dataclass(frozen=True)
class Quantity:
    """One of the three that the paper plots."""

    title: str
    table: str
    kind: str
    """Of the cells: inference or training."""
    unit: str
    published: str


MEMORY = Quantity(
    "peak memory", "Table B5", "inference", "MiB", "tableB5_params_million_and_peak_memory_MiB_forward_batch1"
)
INFERENCE = Quantity("inference", "Table B7", "inference", "ms", "tableB7_inference_ms_batch1")
TRAINING = Quantity("training step", "Table B6", "training", "ms", "tableB6_train_step_ms_effective_batch32")
QUANTITIES = (MEMORY, INFERENCE, TRAINING)


def efficiency(results: Results) -> Section | None:
    """A figure and four tables for each protocol and precision, and the parameters."""
    found = {name[:2] for name in results.of("efficiency")}
    groups = [
        Group(results, name, precision)
        for name, protocol in PROTOCOLS.items()
        for precision in protocol.precisions
        if (name, precision) in found
    ]
    if not groups:
        return None
    blocks: list[Table | Figure] = []
    for group in groups:
        blocks += [group.figure(), group.headline(), *(group.table(quantity) for quantity in QUANTITIES)]
    return Section("efficiency", "Efficiency by length", [*blocks, _parameters()])


def _parameters() -> Table:
    """Counted from the configs, not measured."""
    rows = []
    for model, row in parameter_table().items():
        rows.append(Row(model, [Entry(f"{row['millions']:.3f}")], "ours"))
        if row["published"]:
            rows.append(Row(model, [Entry(f"{row['published']:.3f}")], "published"))
    published_millions = published()[MEMORY.published]["MaBERT"]["params"]
    note = f"No natural configuration of the MaBERT that the paper describes has {published_millions} million."
    caption = "Sequence classifiers with two labels at scale base, counted from their configs."
    return Table("Table B5 · Parameters", caption, [Column("parameters", ("millions",))], rows, [], [note])


@dataclass(frozen=True)
class Group:
    """The cells of one protocol in one precision."""

    results: Results
    protocol: str
    precision: str

    def name(self, kind: str, model: str, length: int) -> str:
        """Of a cell."""
        return f"efficiency/{self.protocol}/{self.precision}/{kind}/{model}/{length}"

    def lengths(self, kind: str) -> list[int]:
        """Those of the scale, and any other that was measured."""
        planned = lengths(self.results.scale, self.protocol, kind)
        group = (self.protocol, self.precision, kind)
        return sorted({*planned, *(int(name[4]) for name in self.results.of("efficiency") if name[:3] == group)})

    def wanted(self, *kinds: str, models: Sequence[str] = MODELS) -> list[str]:
        """Names of all cells of these kinds."""
        return [self.name(kind, model, length) for kind in kinds for model in models for length in self.lengths(kind)]

    def records(self, kind: str, model: str) -> dict[int, Record]:
        """A model's cells, by length."""
        names = {length: self.name(kind, model, length) for length in self.lengths(kind)}
        return {length: self.results.records[name] for length, name in names.items() if name in self.results.records}

    def published(self, quantity: Quantity) -> dict[str, dict[str, Any]]:
        """The paper's numbers; none beside batches of mixed lengths, which the paper did not measure."""
        return {} if PROTOCOLS[self.protocol].choices.get("mixed_lengths") else published()[quantity.published]

    def about(self, *kinds: str) -> str:
        """The protocol, and what the cells say of it."""
        found = self.results.found(self.wanted(*kinds))
        if not found:
            return f"{ABOUT[self.protocol]}; {self.precision}."
        batches = dict.fromkeys(
            f"{'training' if record.config['training'] else 'inference'} at batch {record.config['rows']}"
            for record in found
        )
        fine = [record for record in found if not failure(record)]
        repetitions, warm_up = ([record.at(what) for record in fine] for what in ("repetitions", "warm_up"))
        short = [record for record in fine if record.at("repetitions") < record.config["repetitions"]]
        wanted = counted([record.config["repetitions"] for record in short], "repetition")
        cut = f" {len(short)} of {len(found)} cells have not their {wanted}: their time was over." if short else ""
        note = f" {said}" if (said := self.results.notes.get(f"efficiency/{self.protocol}")) else ""
        size = found[0].config["size"]["name"]
        models = f"models of scale {size}{'' if size == 'base' else f', {NOT_COMPARABLE}'}"
        return (
            f"{ABOUT[self.protocol]}; {self.precision}; {models}; {', '.join(batches)}; medians of "
            f"{counted(repetitions, 'repetition')} after {counted(warm_up, 'run')} to warm up.{cut}{note}"
        )

    def figure(self) -> Figure:
        """Figure 5."""
        panels = [
            Panel(f"({letter}) {quantity.title}", self._plot(quantity))
            for letter, quantity in zip("abc", QUANTITIES, strict=True)
        ]
        caption = (
            f"{self.about(*KINDS)} Both axes are logarithmic. Bars: ± standard deviation of the repetitions. × at the "
            "top: out of memory, or over time."
        )
        title = f"Figure 5 · Efficiency by length, {self.protocol}, {self.precision}"
        return Figure(title, caption, key((m, style(m)) for m in MODELS), panels, self.wanted(*KINDS))

    def _plot(self, quantity: Quantity) -> Html:
        series = []
        for model in MODELS:
            records = self.records(quantity.kind, model)
            fine = {length: record for length, record in records.items() if not failure(record)}
            values = [value(quantity, record) for record in fine.values()]
            spreads = [] if quantity is MEMORY else [mean_and_spread(r.at("samples_ms"))[1] for r in fine.values()]
            failed = [length for length in records if length not in fine]
            series.append(Series(model, style(model), list(fine), values, spreads, failed))
        return plot(
            f"{self.results.scale.name}-{self.protocol}-{self.precision}-{quantity.title}",
            f"{quantity.title} by length, one line a model",
            series,
            Axis("tokens", "log", self.lengths(quantity.kind)),
            Axis(f"{quantity.title} ({quantity.unit})", "log"),
        )

    def table(self, quantity: Quantity) -> Table:
        """Table B5, B6 or B7."""
        lengths, paper = self.lengths(quantity.kind), self.published(quantity)
        prefix = "mem@" if quantity is MEMORY else ""
        columns = [Column(f"{length:,}", (quantity.unit,), "low") for length in lengths]
        rows, first_counts = [], False
        for model in MODELS:
            records = self.records(quantity.kind, model)
            first_counts |= any(record.result.get("warm_up_counted") for record in records.values())
            rows.append(Row(model, [_entry(quantity, records.get(length)) for length in lengths], "ours"))
            if model in paper:
                beside = [paper[model].get(f"{prefix}{length}") for length in lengths]
                rows.append(Row(model, [_number(value) if value else Entry(DASH) for value in beside], "published"))
        notes = [PUBLISHED_ON] if paper else []
        if quantity is MEMORY and self.protocol == "cpu":
            notes.append("Ours is what is resident, Python and its libraries included.")
        notes += self.remarks(quantity)
        if first_counts:
            notes.append("Where a second run would have taken longer than a cell may, the first one counts.")
        title = f"{quantity.table} · {quantity.title.capitalize()}, {self.protocol}, {self.precision}"
        return Table(title, self.about(quantity.kind), columns, rows, self.wanted(quantity.kind), notes)

    def remarks(self, quantity: Quantity) -> list[str]:
        """What the numbers of single models are of."""
        said = []
        if self.precision == "bf16" and quantity is MEMORY:
            said.append(
                "bf16 is autocast: weights are in float32, and what is made of them in bfloat16 counts as well."
            )
        full = [
            f"{length:,}"
            for length, record in self.records(quantity.kind, "BigBird").items()
            if record.result.get("big_bird_attention") == "original_full"
        ]
        if full:
            said.append(f"BigBird attends to everything at {', '.join(full)} tokens, as it does in such short rows.")
        return said

    def headline(self) -> Table:
        """Mean of the five baselines over MaBERT at the longest length that all six have."""
        rows = []
        for quantity in (TRAINING, INFERENCE):
            by_model = {model: self.records(quantity.kind, model) for model in SIX}
            ours = {
                length: {
                    m: records[length].result.get("median_ms") for m, records in by_model.items() if length in records
                }
                for length in self.lengths(quantity.kind)
            }
            rows.append(Row(quantity.title, _ratio(headline(ours)), "ours"))
            if paper := self.published(quantity):
                theirs = {int(length): {model: paper[model][length] for model in SIX} for length in paper["MaBERT"]}
                rows.append(Row(quantity.title, _ratio(headline(theirs)), "published"))
        caption = (
            f"Mean time of {', '.join(BASELINES)} over MaBERT's, at the longest length that all six have a time for. "
            f"{self.about(*KINDS)}"
        )
        title = f"Headline · Baselines over MaBERT, {self.protocol}, {self.precision}"
        columns = [Column("tokens"), Column("mean of the five", ("ms",)), Column("MaBERT", ("ms",)), Column("ratio")]
        notes = [PUBLISHED_ON] if self.published(TRAINING) else []
        return Table(title, caption, columns, rows, self.wanted(*KINDS, models=SIX), notes, head="")


def value(quantity: Quantity, record: Record) -> float:
    """What a cell measured, in the quantity's unit."""
    if quantity is MEMORY:
        place = "peak_gpu_bytes" if "peak_gpu_bytes" in record.result else "peak_resident_bytes"
        return record.at(place) / 2**20
    return float(record.at("median_ms"))


def failure(record: Record) -> Entry | None:
    """What stands in the place of a number that could not be had."""
    if record.result.get("out_of_memory"):
        limit = f"> {record.at('memory_limit_bytes') / 2**30:.1f} GiB" if record.config["device"] == "cpu" else ""
        return Entry("out of memory", limit)
    if record.result.get("over_time"):
        return Entry("over time", f"> {record.at('time_limit_seconds'):g} s")
    return None


def _entry(quantity: Quantity, record: Record | None) -> Entry:
    if record is None:
        return Entry(DASH)
    return failure(record) or _number(value(quantity, record))


def _number(value: float) -> Entry:
    return Entry(f"{value:,.1f}", value=value)


def _ratio(found: Headline | None) -> list[Entry]:
    if found is None:
        return [Entry(DASH)] * 4
    times = [_number(found.baselines_ms), _number(found.mabert_ms)]
    return [Entry(f"{found.length:,}"), *times, Entry(f"{found.ratio:.2f}", is_strong=True)]
