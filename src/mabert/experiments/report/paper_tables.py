"""The paper's tables of scores: Table 1, Figure 3 with Tables B1 to B3 and 2, Table 3, Table B4."""

from collections.abc import Callable, Sequence

from mabert.experiments.architectures import BASELINES
from mabert.experiments.catalogue import PATTERN, named
from mabert.experiments.published import published
from mabert.experiments.report.captions import full_attention, seeds, trained_again
from mabert.experiments.report.collect import Results, model_name
from mabert.experiments.report.markup import Figure, Html, Panel, Section, Table
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.scores import (
    Published,
    comparison_tables,
    glue_scores,
    is_compared,
    on_subsets,
    published_average,
    score_table,
)
from mabert.experiments.report.styles import key, style
from mabert.experiments.scales import PATTERNS

BUDGETS = {
    0.1: ("Table B1", "tableB1_10pct"),
    0.25: ("Table B2", "tableB2_25pct"),
    0.5: ("Table B3", "tableB3_50pct"),
    1.0: ("Table 2", "table2_full_100pct"),
}
ABLATIONS = {
    "Full": ("pre+post", "map"),
    "PSM only": ("pre+post", "cls"),
    "MAP only": ("none", "map"),
    "None": ("none", "cls"),
}
POOLINGS = {"MAP": "map", "ATTN": "attention", "CLS": "cls", "MaskedMean": "mean"}
MISPRINT = (
    "The paper prints the same eight means for “MAP only” in its Table 3 and for “CLS” in its Table B4: one of the two "
    "rows is a misprint."
)
ABOUT_VARIANTS = (
    "All variants fine-tune the same pretrained checkpoint, in padded execution on rows of one length. The paper "
    "leaves open whether its convolution is centred or causal, so both are here. With a causal one, a forward scan and "
    "pads at the end, PSM cannot change a valid token."
)

Point = Callable[[str, float], tuple[float, float | None] | None]
"""(model, budget) -> mean and deviation, if there is one."""


def patterns(results: Results) -> Section | None:
    """Table 1, for each budget after which several patterns were measured."""
    tables = []
    for budget in results.budgets():
        models = [(pattern, model_name(named(pattern), budget)) for pattern in PATTERNS]
        planned = results.scale.patterns if budget == results.scale.pattern_budget else ()
        models = [row for row in models if row[0] in planned or results.is_measured(row[1])]
        if not is_compared(results, models):
            continue
        table = score_table(
            results,
            f"Table 1 · Order of the layers, {budget:.0%} of the pretraining steps",
            models,
            published()["table1_patterns_10pct"],
            about=f"M is a Mamba layer, T a Transformer layer; {PATTERN} is MaBERT.",
            head="pattern",
            has_pretraining=True,
            notes=() if budget == 0.1 else ["Published: after 10% of the paper's steps."],
        )
        tables += [table, *comparison_tables(results, models, model_name("MaBERT", budget))]
    return Section("patterns", "Layer patterns", tables) if tables else None


def budgets(results: Results) -> Section | None:
    """Figure 3, and its numbers in Tables B1 to B3 and 2."""
    names = ("MaBERT", *BASELINES)
    tables, measured = [], []
    for budget in results.budgets():
        models = [(name, model_name(name, budget)) for name in names]
        if results.scores() and is_compared(results, models):
            title, source = BUDGETS.get(budget, ("Pretraining budget", ""))
            title = f"{title} · {budget:.0%} of the pretraining steps"
            table = score_table(results, title, models, published()[source] if source else {})
            tables += [table, *comparison_tables(results, models, model_name("MaBERT", budget))]
            measured.append(budget)
    if not tables:
        return None
    about = (
        "Each budget is a run of its own: its share of the steps, the same schedule of lengths, and a learning rate "
        f"that has decayed to zero at its end. {full_attention(results)}"
    )
    return Section("budgets", "Pretraining budgets", [_budget_figure(results, names, measured), *tables], about)


def ablations(results: Results) -> Section | None:
    """Table 3, for every architecture that was ablated."""
    paper = published()["table3_ablation_100pct"]
    tables = _variant_tables(results, "Table 3 · PSM and MAP", ABLATIONS, paper)
    return Section("ablations", "Ablation of PSM and MAP", tables, ABOUT_VARIANTS) if tables else None


def pooling(results: Results) -> Section | None:
    """Table B4, for every architecture that was ablated."""
    variants = {row: ("pre+post", pooling) for row, pooling in POOLINGS.items()}
    tables = _variant_tables(results, "Table B4 · Pooling", variants, published()["tableB4_pooling_100pct"])
    return Section("pooling", "Pooling", tables, ABOUT_VARIANTS) if tables else None


def _variant_tables(
    results: Results, title: str, variants: dict[str, tuple[str, str]], paper: Published
) -> list[Table]:
    architectures = {name.partition("~")[0] for name, *_ in results.of("finetuning") if "~" in name}
    tables = []
    for architecture in sorted(architectures):
        models = [(row, f"{architecture}~psm={psm},pooling={pool}") for row, (psm, pool) in variants.items()]
        if is_compared(results, models):
            convolution = "causal" if architecture.endswith("-causal") else "centred"
            settings = "; ".join(f"{row}: psm {psm}, pooling {pool}" for row, (psm, pool) in variants.items())
            about = f"{architecture}. {settings}."
            title_of_one = f"{title}, {convolution} convolution"
            table = score_table(results, title_of_one, models, paper, about=about, head="variant", notes=[MISPRINT])
            tables += [table, *comparison_tables(results, models, models[0][1])]
    return tables


def _budget_figure(results: Results, names: Sequence[str], measured: Sequence[float]) -> Figure:
    scores = results.scores()
    glue = glue_scores(scores)

    def ours(name: str, budget: float) -> tuple[float, float | None] | None:
        found = results.average(model_name(name, budget), glue or scores)
        return found.mean_and_spread if found.is_complete else None

    def theirs(name: str, budget: float) -> tuple[float, float | None]:
        return published_average(published()[BUDGETS[budget][1]][name], scores), None

    identity = f"{results.scale.name}-budgets"
    panels = [Panel("ours", _budget_plot(identity, names, measured, ours))]
    if glue:
        panels.append(Panel("published", _budget_plot(f"{identity}-published", names, list(BUDGETS), theirs)))
    models = [model_name(name, budget) for budget in measured for name in names]
    what = f"Average of {len(glue)} GLUE scores" if glue else "Score of the generated task"
    caption = (
        f"{' '.join([what, *on_subsets(results, glue or scores, models)])} after each budget of pretraining; "
        f"a point needs all tasks and seeds. {seeds(results, models)}"
    )
    wanted = [name for model in models for score in scores for name in results.finetunings(model, score.task)]
    notes = [*(["The paper gives no deviation of its averages."] if glue else []), *trained_again(results, wanted)]
    legend = key((name, style(name)) for name in names)
    return Figure("Figure 3 · Score across pretraining budgets", caption, legend, panels, wanted, notes)


def _budget_plot(identity: str, names: Sequence[str], measured: Sequence[float], point: Point) -> Html:
    series = []
    for place, name in enumerate(names):
        beside = 0.6 * (place - (len(names) - 1) / 2)  # so that error bars do not hide one another
        found = {100 * budget + beside: value for budget in measured if (value := point(name, budget))}
        means, deviations = [mean for mean, _ in found.values()], [deviation for _, deviation in found.values()]
        series.append(Series(name, style(name), list(found), means, deviations))
    ticks = [100 * budget for budget in measured]
    x = Axis("pretraining budget (% of the steps)", ticks=ticks)
    return plot(identity, "Average score by pretraining budget, one line a model", series, x, Axis("average score"))
