"""Tables of task scores: mean ± standard deviation over seeds, beside the published ones, and paired differences."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from mabert.experiments.comparison import mean_and_spread
from mabert.experiments.report.captions import at_scale, counted, matched, seeds, trained_again
from mabert.experiments.report.collect import Models, Results, Score
from mabert.experiments.report.markup import DASH, Column, Entry, Row, Source, Table, entry
from mabert.experiments.report.pretraining import first_length, held_out, parameters

Published = dict[str, dict[str, Any]]
"""How a row is called -> title of a column -> [mean, standard deviation]."""

ROUNDING = 1e-9
METRICS = {"mcc": "Matthews corr.", "accuracy": "accuracy", "f1": "F1"}


def is_compared(results: Results, models: Models) -> bool:
    """Whether at least two of the models have results."""
    return sum(results.is_measured(model) for _, model in models) > 1


def score_table(
    results: Results,
    title: str,
    models: Models,
    paper: Published,
    *,
    about: str = "",
    head: str = "model",
    has_pretraining: bool = False,
    notes: Sequence[str] = (),
) -> Table:
    """Every task that was run and their average, ours above the published.

    Args:
        models: the rows.
        paper: what was published, if anything.
        has_pretraining: also the held-out loss and the parameters.
    """
    scores = results.scores()
    averaged = glue_scores(scores) or scores
    names = [model for _, model in models]
    columns = [_column(results, score, names) for score in scores]
    if len(averaged) > 1:
        columns.append(Column("average", (f"of {len(averaged)}", *on_subsets(results, averaged, names)), "high"))
    if has_pretraining:
        columns.append(Column("held-out loss", ("nats", f"rows of {first_length(results)}"), "low"))
        columns.append(Column("parameters", ("millions",)))
    has_published = bool(paper and glue_scores(scores))
    rows = []
    for label, model in models:
        entries = [entry(results.score(model, score)) for score in scores]
        if len(averaged) > 1:
            entries.append(entry(results.average(model, averaged)))
        if has_pretraining:
            entries += [entry(held_out(results, model, "loss")), entry(parameters(results, model), ".2f")]
        rows.append(Row(label, entries, "ours" if has_published else ""))
        if has_published:
            rows.append(_row(label, _published(paper[label], scores), len(columns), "published"))
    rows.append(_row("majority class", _majority(results, scores), len(columns), "baseline"))
    wanted = [name for model in names for score in scores for name in results.finetunings(model, score.task)]
    if has_pretraining:
        wanted += [name for model in names for name in results.pretrainings(model)]
    notes = [*notes, *trained_again(results, wanted)]
    if paper and not has_published:
        notes = [*notes, "The published scores are those of GLUE tasks, none of which was run here."]
    caption = " ".join(filter(None, (about, seeds(results, names), matched(results, names))))
    return Table(title, caption, columns, rows, wanted, notes, head)


def glue_scores(scores: Iterable[Score]) -> list[Score]:
    """Those that the paper has."""
    return [score for score in scores if score.is_glue]


def published_average(row: dict[str, Any], scores: Iterable[Score]) -> float:
    """Mean of a model's published scores, of those that we have too."""
    return mean_and_spread([row[score.title][0] for score in glue_scores(scores)])[0]


def _row(label: str, entries: list[Entry], width: int, source: Source) -> Row:
    return Row(label, entries + [Entry()] * (width - len(entries)), source)


def _column(results: Results, score: Score, models: Iterable[str]) -> Column:
    """Its metric, and what has to stand beside scores on a part of the data."""
    return Column(score.title, (METRICS[score.metric], *_subsets(results, score, models)), "high")


def _subsets(results: Results, score: Score, models: Iterable[str]) -> list[str]:
    records = [record for model in models for record in results.found(results.finetunings(model, score.task))]
    return list(dict.fromkeys(str(record.at("splits", score.split, "subset")) for record in records))


def on_subsets(results: Results, scores: Iterable[Score], models: Sequence[str]) -> list[str]:
    """What has to stand beside an average of scores, where some are on a part of the data."""
    partial = [score.title for score in scores if any(_subsets(results, score, models))]
    return [f"({', '.join(partial)}: subset)"] if partial else []


def _published(row: dict[str, Any], scores: Sequence[Score]) -> list[Entry]:
    entries = []
    for score in scores:
        if score.is_glue:
            mean, deviation = row[score.title]
            entries.append(Entry(f"{mean:.3f}", f"±{deviation:.3f}", mean))
        else:
            entries.append(Entry(DASH))
    if len(glue_scores(scores)) > 1:
        average = published_average(row, scores)
        entries.append(Entry(f"{average:.3f}", "", average))
    return entries


def _majority(results: Results, scores: Iterable[Score]) -> list[Entry]:
    """What naming the commonest class for every row scores."""
    by_task = {task: record for (_, _, task, _), record in results.of("finetuning").items()}
    values = [by_task[score.task].at("splits", score.split, "majority", score.metric) for score in scores]
    return [Entry(f"{value:.3f}") for value in values]


def comparison_tables(results: Results, models: Models, ours: str) -> list[Table]:
    """How far one of the models is from each of the others, as far as that was computed: one table or none."""
    scores = results.scores()
    labels = {model: label for label, model in models}
    rows, wanted, stale = [], [], []
    splits: list[dict[str, Any]] = []
    for other in (model for model in labels if model != ours):
        entries = []
        for score in scores:
            name = f"comparisons/{ours}--{other}/{score.task}"
            wanted.append(name)
            found = [record.at("splits", score.split) for record in results.found([name])]
            splits += found
            entries.append(_difference(found[0]) if found else Entry(DASH))
            if found and _is_stale(results, ours, other, score, found[0]["difference"]):
                stale.append(name)
        rows.append(Row(labels[other], entries))
    if not splits or ours not in labels:
        return []
    pretrained, runs = ([split.get(key, 1) for split in splits] for key in ("pretrained", "seeds"))
    each = [count // models for count, models in zip(runs, pretrained, strict=True)]
    drawn = "" if max(pretrained) > 1 else " The chance in pretraining is not in it."
    caption = (
        f"Difference of the mean scores and its {splits[0]['confidence']:.0%} interval, by paired bootstrap over "
        f"{counted(pretrained, 'pretraining seed')}, {counted(each, 'fine-tuning seed')} of each and the rows of the "
        f"dev set; bold where the interval excludes zero, which one in twenty does by chance.{drawn} "
        f"{at_scale(results)}."
    )
    names = [model for _, model in models]
    notes = [f"Runs were made again since: delete {', '.join(stale)} and run these cells again."] if stale else []
    columns = [replace(_column(results, score, names), best="") for score in scores]
    return [Table(f"{labels[ours]} minus each of the others", caption, columns, rows, wanted, notes, head="other")]


def _is_stale(results: Results, ours: str, other: str, score: Score, difference: float) -> bool:
    """Whether a difference is not that of the scores which stand beside it."""
    one, two = results.score(ours, score), results.score(other, score)
    if not (one.is_complete and two.is_complete):
        return False
    return abs(one.mean_and_spread[0] - two.mean_and_spread[0] - difference) > ROUNDING


def _difference(split: dict[str, Any]) -> Entry:
    low, high = split["low"], split["high"]
    return Entry(_signed(split["difference"]), f"[{_signed(low)}, {_signed(high)}]", is_strong=low > 0 or high < 0)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
