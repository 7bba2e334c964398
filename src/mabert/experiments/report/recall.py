"""Hybrids: what they recall, by length and place, and through which memory; and their loss as language models."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mabert.config import FUSIONS
from mabert.data.recall import PLACES
from mabert.experiments.causal_architectures import HYBRIDS
from mabert.experiments.comparison import mean_interval
from mabert.experiments.report.captions import at_scale, counted
from mabert.experiments.report.collect import Measured, Record, Results
from mabert.experiments.report.markup import DASH, Column, Entry, Figure, Panel, Row, Section, Table, entry
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.styles import key, style
from mabert.models.causal import MEMORIES
from mabert.training.recall import LEARNT, RECENT

ABOUT = (
    "Attention and a state space (Mamba-2, unless it is said otherwise) one after the other in a layer, or side by "
    "side and fused, beside each alone: as many mixers in all (half the layers where a layer has two; a fusion by "
    "attention is one more), and as many parameters outside the embeddings. Of the paper (arXiv 2510.26912) its "
    "abstract is known to us, not its sizes, tasks or numbers: these settings are ours. It finds sequential hybrids "
    "better on shorter contexts, parallel ones on longer, and fusion by attention to recall best. What was found here "
    "stands below the figure."
)
PROBES = {"recurrent-only": "recurrent only", "attention-only": "attention only", "none": "neither"}
FAMILIES = {
    "sequential": ("sequential", "sequential-attention-first"),
    "parallel": tuple(f"parallel-{fusion}" for fusion in FUSIONS if not fusion.startswith("merge-attention")),
    "merged": tuple(f"parallel-{fusion}" for fusion in FUSIONS if fusion.startswith("merge-attention")),
}
"""Hybrids that are compared together. Merged attention stands apart: it is one more mixer, without rotary positions."""
COMPARED = ("parallel", "merged")
"""With the sequential ones."""
ASKED = ("spread", "early")
"""Places of the facts for which a change with length is decided on: anywhere, and as far as can be."""
LEVEL = 0.05
"""Of all such decisions together."""
CEILING = 0.99
"""From here on nothing is left to differ in."""
LEAST_SEEDS = 5
"""With fewer of them nothing is said about what differs."""
assert PROBES.keys() == MEMORIES.keys() - {"both"}  # as it is, a model is asked by place


def hybrids(results: Results) -> Section | None:
    """Loss as language models, then recall."""
    blocks: list[Table | Figure] = []
    trained = {model for model, _ in results.of("causal")}
    if trained & (HYBRIDS.keys() - {"Transformer", "Mamba-2"}):
        blocks.append(_loss_table(results))
    kinds = dict.fromkeys(kind for _, kind, _ in results.of("recall"))
    for kind in kinds:
        recall = _Kind(results, kind)
        blocks += [recall.length_figure(), *([recall.lessons_table()] if recall.found[0].at("lessons") else [])]
        blocks += [
            recall.asked_table(pairs, length) for pairs, lengths in recall.lengths().items() for length in lengths
        ]
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


@dataclass(frozen=True)
class _Kind:
    """The cells of one kind of recall task."""

    results: Results
    kind: str

    @property
    def seeds(self) -> list[int]:
        return sorted({int(seed) for _, kind, seed in self.results.of("recall") if kind == self.kind})

    def cells(self, model: str) -> list[str]:
        return [f"recall/{model}/{self.kind}/{seed}" for seed in self.seeds]

    @property
    def wanted(self) -> list[str]:
        return [cell for model in HYBRIDS for cell in self.cells(model)]

    @property
    def found(self) -> list[Record]:
        return self.results.found(self.wanted)

    def lengths(self) -> dict[int, list[int]]:
        """The lengths that were asked for with each number of facts."""
        asked = sorted({(asked["pairs"], asked["length"]) for record in self.found for asked in record.at("asked")})
        return {pairs: [length for of, length in asked if of == pairs] for pairs, _ in asked}

    def trained_on(self, pairs: int) -> list[int]:
        """Those of them that rows of training had."""
        return sorted(
            {task["length"] for record in self.found for task in record.config["tasks"] if task["pairs"] == pairs}
        )

    def titled(self, pairs: int) -> str:
        return self.kind if pairs == 1 else f"{self.kind}, {pairs} facts"

    def about(self) -> str:
        """How the models were trained, and what is shown of them."""
        runs = [record.config["run"] for record in self.found]
        taught = sorted({record.at("taught") for record in self.found})
        return (
            f"{at_scale(self.results)}; {self.mixers()}{_listed(taught)} steps of lessons, then {_each(runs, 'steps')} "
            f"steps of {_each(runs, 'tokens')} tokens on all lengths of training and numbers of facts in turns, the "
            f"same rows for every model. {self.scored()}"
        )

    def mixers(self) -> str:
        """What they are, where they are not Mamba-2 and attention to everything before."""
        sizes = [record.config["size"] for record in self.found]
        ssms, windows = {size["ssm"] for size in sizes}, {size["sliding_window"] for size in sizes}
        said = "" if ssms == {"mamba2"} else f"the SSM is {' or '.join(sorted(ssms))} in all of them; "
        if windows != {None}:
            said += f"attention reaches {' or '.join(sorted(str(window or 'all') for window in windows))} tokens; "
        return said

    def guessed(self, pairs: int, length: int) -> str:
        """What guessing among the values of a row gets."""
        if pairs == 1:
            return ""
        shares = {
            f"{asked['guessing']:.1%}"
            for record in self.found
            for asked in record.at("asked")
            if (asked["pairs"], asked["length"]) == (pairs, length)
        }
        return f" Who knows the row's values and guesses whose they are: {' or '.join(sorted(shares))} (simulated)."

    def scored(self) -> str:
        """What a score is."""
        rows = " or ".join(f"{n:,}" for n in sorted({record.config["eval_rows"] for record in self.found}))
        seeds = counted([len(self.seeds)], "seed")
        return f"Share of answers that are right in all tokens, on {rows} rows; {seeds}."

    def measure(self, model: str, pairs: int, length: int, what: str, which: str) -> Measured:
        """What was answered to so many facts in such rows, over the seeds."""

        def value(record: Record) -> float:
            for asked in record.at("asked"):
                if (asked["pairs"], asked["length"]) == (pairs, length):
                    return asked[what][which]
            raise ValueError(f"{record.path}: {pairs} facts in {length} tokens are not asked. Run its cell again.")

        return self.results.measure(self.cells(model), value)

    def lessons_table(self) -> Table:
        """How soon each architecture learnt each lesson."""
        columns: dict[int, Column] = {}
        learnt: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for model in HYBRIDS:
            for record in self.results.found(self.cells(model)):
                for index, lesson in enumerate(record.at("lessons")):
                    pairs, where = lesson["pairs"], f"in {lesson['length']} tokens, {lesson['steps']:,} steps"
                    columns[index] = Column(counted([pairs], "fact") if pairs else "copying", (where,))
                    learnt.setdefault((model, index), []).append(lesson)
        rows = []
        for model in HYBRIDS:
            seeds = len(self.results.found(self.cells(model)))
            entries = [_learnt(learnt.get((model, index), []), seeds) for index in sorted(columns)]
            rows.append(Row(model, entries if seeds else [Entry(DASH)] * len(columns)))
        caption = (
            f"Steps until the loss of the last {RECENT} was below "
            f"{LEARNT} nats a token, or half of a guesser's, mean over the seeds that got there; behind it how many "
            f"did, where not all. A lesson is as long for every model, learnt or not. {self.about()}"
        )
        in_order = [columns[index] for index in sorted(columns)]
        return Table(f"Lessons · {self.kind}", caption, in_order, rows, self.wanted)

    def length_figure(self) -> Figure:
        """Accuracy by length, one plot for each number of facts."""
        panels, notes = [], []
        for pairs, lengths in self.lengths().items():
            series = []
            for model in HYBRIDS:
                measured = {float(n): self.measure(model, pairs, n, "accuracy", "spread") for n in lengths}
                found = {n: of.mean_and_spread for n, of in measured.items() if of.is_complete}
                means, spreads = [mean for mean, _ in found.values()], [spread for _, spread in found.values()]
                series.append(Series(model, style(model), list(found), means, spreads))
            svg = plot(
                f"{self.results.scale.name}-recall-{self.kind}-{pairs}",
                f"Recall of {self.titled(pairs)}, by length of the row, one line an architecture",
                series,
                Axis("tokens in the row", "log", lengths),
                Axis("answers that are right"),
            )
            panels.append(Panel(self.titled(pairs), svg))
            if guessed := self.guessed(pairs, lengths[0]):
                notes.append(f"{self.titled(pairs)}.{guessed}")
            if beyond := [length for length in lengths if length not in self.trained_on(pairs)]:
                notes.append(f"{self.titled(pairs)}: no row of training had {_listed(beyond)} tokens.")
            if trained := self.trained_on(pairs):
                notes += [*self.alone_and_fused(pairs, trained), *self.by_memory(pairs, trained[-1])]
            for place in ASKED:
                notes += self.findings(pairs, place)
        if len(self.seeds) >= LEAST_SEEDS:
            notes.append(
                f"Intervals of changes with length are wide enough that all {self.statements} of them hold the truth "
                f"with {1 - LEVEL:.0%} (Bonferroni)."
            )
        caption = f"Facts anywhere in the row. {self.about()} Bars: ± standard deviation over the seeds."
        legend = key((model, style(model)) for model in HYBRIDS)
        return Figure(f"Recall by length · {self.kind}", caption, legend, panels, self.wanted, notes)

    def alone_and_fused(self, pairs: int, lengths: Sequence[int]) -> list[str]:
        """What attention, the SSM and the fusions recall over all lengths; nothing while cells are missing."""
        means: dict[str, float] = {}
        for model in HYBRIDS:
            measured = [self.measure(model, pairs, length, "accuracy", "spread") for length in lengths]
            if not all(of.is_complete for of in measured):
                return []
            means[model] = sum(of.mean_and_spread[0] for of in measured) / len(measured)
        fusions = [model for model in means if model.startswith("parallel")]
        least, most = min(fusions, key=means.__getitem__), max(fusions, key=means.__getitem__)
        return [
            f"{self.titled(pairs)}, mean over the lengths of training: attention alone recalls "
            f"{means['Transformer']:.1%}, the SSM alone {means['Mamba-2']:.1%}, the fusions "
            f"{means[least]:.1%} ({least}) to {means[most]:.1%} ({most})."
        ]

    def by_memory(self, pairs: int, length: int) -> list[str]:
        """What passes through one memory of the hybrids alone; nothing while cells are missing."""
        found = {}
        for memories in PROBES:
            measured = [
                self.measure(model, pairs, length, "probes", memories) for of in FAMILIES.values() for model in of
            ]
            if not all(of.is_complete for of in measured):
                return []
            means = [of.mean_and_spread[0] for of in measured]
            found[memories] = f"{min(means):.1%} to {max(means):.1%}"
        return [
            f"{self.titled(pairs)}, {length:,} tokens: through their states alone the hybrids recall "
            f"{found['recurrent-only']}, through attention alone {found['attention-only']}, through neither "
            f"{found['none']}."
        ]

    def spans(self, pairs: int) -> dict[tuple[int, int], str]:
        """From which length to which a change is decided on: within training, and from there to the longest."""
        trained, longest = self.trained_on(pairs), self.lengths()[pairs][-1]
        if not trained:
            return {}
        spans = {(trained[0], trained[-1]): "", (trained[-1], longest): ", beyond training"}
        return {(first, last): where for (first, last), where in spans.items() if first < last}

    def findings(self, pairs: int, place: str) -> list[str]:
        """Whether a family of hybrids recalls better than the sequential ones, and more so in longer rows.

        Differences are of means over the families, seed by seed. Decided is for each family and span of lengths whether
        the difference changes. Nothing while cells are missing.
        """
        lengths = self.lengths()[pairs]
        means = {family: [self.family(family, pairs, length, place) for length in lengths] for family in FAMILIES}
        if not all(seeds for of in means.values() for seeds in of):
            return []
        notes = []
        for family in COMPARED:
            differences = {
                length: [100 * (one - other) for one, other in zip(ours, theirs, strict=True)]
                for length, ours, theirs in zip(lengths, means[family], means["sequential"], strict=True)
            }
            said = f"{self.titled(pairs)}, {place}: {family} minus sequential, in points: "
            said += ", ".join(f"{fmean(of):+.1f}{_within(of)} at {length:,}" for length, of in differences.items())
            if len(self.seeds) < LEAST_SEEDS:
                notes.append(f"{said}; too few seeds to decide anything.")
                continue
            said += " (95% each, over the seeds)."
            for (first, last), where in self.spans(pairs).items():
                asked = [means[of][lengths.index(length)] for of in (family, "sequential") for length in (first, last)]
                changes = [after - before for before, after in zip(differences[first], differences[last], strict=True)]
                decided = "all at the ceiling" if min(map(min, asked)) >= CEILING else self.decided(changes)
                said += f" From {first:,} to {last:,}{where}: {decided}."
            notes.append(said)
        return notes

    def decided(self, changes: Sequence[float]) -> str:
        """Whether a difference changes with length, in points, at a level that holds for all such statements."""
        low, high = (round(bound, 1) + 0.0 for bound in mean_interval(changes, 1 - LEVEL / self.statements))
        verdict = "gains with length" if low > 0 else "loses with length" if high < 0 else "no change seen"
        return f"{low:+.1f} to {high:+.1f}, {verdict}"

    @property
    def statements(self) -> int:
        """How many changes are decided on in the figure."""
        return sum(len(self.spans(pairs)) for pairs in self.lengths()) * len(COMPARED) * len(ASKED)

    def family(self, family: str, pairs: int, length: int, place: str) -> list[float]:
        """Means over a family, one a seed; empty while cells are missing."""
        measured = [self.measure(model, pairs, length, "accuracy", place) for model in FAMILIES[family]]
        if not all(of.is_complete for of in measured):
            return []
        return [fmean(values) for values in zip(*(of.values for of in measured), strict=True)]

    def asked_table(self, pairs: int, length: int) -> Table:
        """Accuracy in rows of one length, by where the facts stand and by what may pass from them to the questions."""
        columns = [
            Column(place, ("facts side by side",) if place != "spread" else ("over the row",), "high")
            for place in PLACES
        ]
        columns += [Column(title, ("facts spread",)) for title in PROBES.values()]
        keys = [("accuracy", place) for place in PLACES] + [("probes", memories) for memories in PROBES]
        rows = [
            Row(model, [entry(self.measure(model, pairs, length, *key), ".1%") for key in keys]) for model in HYBRIDS
        ]
        about = (
            "By place of the facts; then by what may pass from them to the questions: what the states hold, what "
            "attention reaches, or nothing. Models were trained with both."
        )
        title = f"Recall by place and memory · {self.titled(pairs)} in {length:,} tokens"
        if length not in self.trained_on(pairs):
            about += " No row of training was so long."
        caption = f"{at_scale(self.results)}. {about}{self.guessed(pairs, length)} {self.scored()}"
        return Table(title, caption, columns, rows, self.wanted)


def _each(runs: Sequence[dict[str, Any]], field: str) -> str:
    return _listed(sorted({run[field] for run in runs}))


def _listed(numbers: Sequence[float]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _within(values: Sequence[float]) -> str:
    """Half of the interval of a mean, or nothing where there is none."""
    if len(values) < LEAST_SEEDS:
        return ""
    low, high = mean_interval(values)
    return f" ±{(high - low) / 2:.1f}"


def _learnt(lessons: Sequence[dict[str, Any]], seeds: int) -> Entry:
    """One lesson, as far as the models of these seeds got to it."""
    steps = [lesson["learnt_after"] for lesson in lessons if lesson["learnt_after"] is not None]
    if not steps:
        return Entry("not learnt" if lessons else DASH)
    return Entry(f"{sum(steps) / len(steps):,.0f}", "" if len(steps) == seeds else f"{len(steps)} of {seeds}")
