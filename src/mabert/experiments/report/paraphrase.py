"""Continual training on paraphrases: recall before and after, beside controls.

A model that is taught to recall first tells of that in a cell of its own, which is no row of the table.
"""

from collections.abc import Callable, Sequence

from mabert.data.recall import KINDS
from mabert.experiments.paraphrase import GAINS
from mabert.experiments.report.captions import at_scale, counted
from mabert.experiments.report.collect import Record, Results
from mabert.experiments.report.markup import Column, Row, Section, Table, entry

ABOUT = (
    "A causal model goes on training on text of which a share is passages, a gap, and the same in other words, in one "
    "document. Controls: text alone (none), the passage word for word (verbatim), another passage (unrelated), passage "
    "and paraphrase in two documents (apart). A model pretrained on so little text recalls nothing, so it gets lessons "
    "in recall before: the question is what is kept of it, and what is gained. After arXiv 2510.26912, whose abstract "
    "reports more recall and nothing else lost; its settings and numbers are not known to us."
)
BASE, BEFORE = "base", "before"


def paraphrase(results: Results) -> Section | None:
    """One table a model."""
    cells = results.of("paraphrase")
    tables = [_table(results, model) for model in dict.fromkeys(model for model, text, _ in cells if text != BASE)]
    return Section("paraphrase", "Training on paraphrases", tables, ABOUT) if tables else None


def _table(results: Results, model: str) -> Table:
    found = [(text, seed) for of, text, seed in results.of("paraphrase") if of == model and text != BASE]
    texts = sorted(dict.fromkeys(text for text, _ in found), key=lambda text: (text != BEFORE, text != "none", text))
    seeds = sorted({int(seed) for text, seed in found if text != BEFORE})
    columns = [Column("held-out loss", ("nats a token",), "low")]
    values: list[tuple[Callable[[Record], float], str]] = []
    records = results.found(f"paraphrase/{model}/{text}/{seed}" for text, seed in found)
    for kind, length in _asked(records):
        title = f"{kind}, {length:,} tokens"
        columns += [Column(title, ("answers right",), "high"), Column(title, ("nats of the answers",), "low")]
        values += [(_recall(kind, length, "accuracy"), ".1%"), (_recall(kind, length, "loss"), ".3f")]
    for name in GAINS:
        columns.append(Column(f"gain, {name}", ("nats a token",), "high"))
        values.append((_gain(name), ".3f"))
    rows, wanted = [], []
    for text in texts:
        names = [f"paraphrase/{model}/{text}/{seed}" for seed in ([0] if text == BEFORE else seeds)]
        wanted += names
        loss = results.measure(names, _loss)
        rows.append(Row(text, [entry(loss), *(entry(results.measure(names, value), form) for value, form in values)]))
    tokens = sorted({int(record.at("tokens")) for record in records if "tokens" in record.result})
    caption = (
        f"{at_scale(results)}; {' or '.join(f'{n:,}' for n in tokens) or 'no'} tokens of continual training; "
        f"{counted([len(seeds)], 'seed')} of it, from one checkpoint. {_taught(results, model)}Recall is asked in "
        "words of the vocabulary with real held-out text between, in rows of a quarter of the model's length, as they "
        "were taught, and in whole ones, which were not. "
        f"{_guessed(records)}Gain: how much better a held-out paraphrase, or passage, is predicted behind its passage "
        "than behind another pair's."
    )
    notes = ["Numbers behind a kind of text: its share of the words, in percent."]
    return Table(f"Paraphrases · {model}", caption, columns, rows, wanted, notes, head="text")


def _taught(results: Results, model: str) -> str:
    """What came before all of it, where there is a cell that tells."""
    said = ""
    for base in results.found([f"paraphrase/{model}/{BASE}/0"]):
        run, task, lessons = base.config["run"], base.config["task"], base.at("lessons")
        learnt = sum(lesson["learnt_after"] is not None for lesson in lessons)
        said = (
            f"The checkpoint was taught {task['kind']}, with text of training between, in "
            f"{base.at('taught') + run['steps']:,} steps ({learnt} of {counted([len(lessons)], 'lesson')} learnt): "
            "before means after that, and other kinds of recall were never taught. "
        )
    return said


def _asked(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Kinds of recall with the lengths of their rows."""
    return [
        (kind, length)
        for kind in KINDS
        for length in sorted({int(length) for record in records for length in record.at("recall", kind)})
    ]


def _guessed(records: Sequence[Record]) -> str:
    """What one gets in each kind who knows the answers in a row and guesses whose they are."""
    shares = {
        (kind, score["guessing"])
        for record in records
        for kind in KINDS
        for score in record.at("recall", kind).values()
    }
    told = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(shares) if share < 1)
    return f"Who knows a row's answers and guesses whose they are: {told} (simulated). " if told else ""


def _recall(kind: str, length: int, what: str) -> Callable[[Record], float]:
    return lambda record: record.at("recall", kind, str(length), what)


def _gain(name: str) -> Callable[[Record], float]:
    return lambda record: record.at("gains", name, "gain")


def _loss(record: Record) -> float:
    return record.at("held_out_loss")
