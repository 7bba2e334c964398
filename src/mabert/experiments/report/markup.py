"""HTML from data: elements, tables, figures, and what stands below each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from mabert.experiments.report.collect import Measured, Record, Results

DASH = "–"
WIDE = 6  # columns; in a table with more, deviations stand below their means
Source = Literal["", "ours", "published", "baseline"]


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Html:
    """An element; children that are plain text are escaped, an attribute that is "" is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items() if value
    )
    return Html(f"<{tag}{shown}>{joined(children)}</{tag}>")


def joined(children: Iterable[str]) -> Html:
    """Children one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


@dataclass(frozen=True)
class Entry:
    """What stands in one field of a table."""

    text: str = ""
    small: str = ""
    """Behind it, smaller: the deviation, or how many cells there are."""
    value: float | None = None
    """What it competes with for being the best of its column."""
    is_strong: bool = False


def entry(measured: Measured, form: str = ".3f") -> Entry:
    """Mean ± standard deviation, or a dash while cells are missing."""
    if not measured.is_complete:
        count = f"{len(measured.values)} of {len(measured.names)} cells" if measured.values else ""
        return Entry(DASH, count)
    mean, spread = measured.mean_and_spread
    return Entry(f"{mean:{form}}", "" if spread is None else f"±{spread:{form}}", mean)


@dataclass(frozen=True)
class Column:
    """Its head, and which of its values is the best."""

    title: str
    notes: tuple[str, ...] = ()
    best: Literal["high", "low", ""] = ""


@dataclass(frozen=True)
class Row:
    """One line; a published one stands below ours."""

    label: str
    entries: Sequence[Entry]
    source: Source = ""


@dataclass(frozen=True)
class Table:
    """A table and all that has to be said about it."""

    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    wanted: Sequence[str]
    """Names of the cells that it shows, found or not."""
    notes: Sequence[str] = ()
    head: str = "model"


@dataclass(frozen=True)
class Panel:
    """One plot of a figure."""

    title: str
    svg: Html


@dataclass(frozen=True)
class Figure:
    """Plots that share a key."""

    title: str
    caption: str
    key: Html
    panels: Sequence[Panel]
    wanted: Sequence[str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """One experiment at one scale."""

    name: str
    title: str
    blocks: Sequence[Table | Figure]
    about: str = ""

    @property
    def wanted(self) -> list[str]:
        """Names of the cells that it shows, found or not, each once."""
        return list(dict.fromkeys(name for block in self.blocks for name in block.wanted))


def render_block(block: Table | Figure, results: Results) -> Html:
    """A table or figure with its caption above and its notes and origin below."""
    wanted = list(dict.fromkeys(block.wanted))
    found = results.found(wanted)
    count = f" {len(found)} of {len(wanted)} cells." if wanted else ""
    caption = element("figcaption", element("b", f"{block.title}. "), block.caption + count)
    body = _table(block) if isinstance(block, Table) else _panels(block)
    notes = [element("ul", *(element("li", note) for note in block.notes), class_="notes")] if block.notes else []
    below = [element("p", origin(found), class_="origin")] if wanted else []
    return element("figure", caption, body, *notes, *below)


def _panels(figure: Figure) -> Html:
    panels = [element("div", element("h4", panel.title), panel.svg, class_="panel") for panel in figure.panels]
    return joined([figure.key, element("div", *panels, class_="panels")])


def _table(table: Table) -> Html:
    heads = [element("th", table.head, scope="col", class_="label")]
    for column in table.columns:
        notes = [element("small", note) for note in column.notes if note]
        heads.append(element("th", column.title, *notes, scope="col"))
    best = {row.source: _best(table, row.source) for row in table.rows}
    lines = []
    for row in table.rows:
        label = "published" if row.source == "published" else row.label
        name = element(
            "th", label, scope="row", class_="label", aria_label=f"{row.label}, published" if label != row.label else ""
        )
        fields = [_field(*pair) for pair in zip(row.entries, best[row.source], strict=True)]
        lines.append(element("tr", name, *fields, class_=row.source))
    width = "wide" if len(table.columns) > WIDE else ""
    body = element("table", element("thead", element("tr", *heads)), element("tbody", *lines), class_=width)
    return element("div", body, class_="scroll", tabindex="0")


def _field(entry: Entry, best: str | None) -> Html:
    is_strong = entry.is_strong or (entry.value is not None and entry.text == best)
    small = [element("small", entry.small)] if entry.small else []
    return element("td", element("b", entry.text) if is_strong else entry.text, *small)


def _best(table: Table, source: Source) -> list[str | None]:
    """The text of each column's best value of one source, where they are not all the same."""
    texts: list[str | None] = []
    for place, column in enumerate(table.columns):
        entries = [row.entries[place] for row in table.rows if row.source == source and source != "baseline"]
        rivals = [(entry.value, entry.text) for entry in entries if entry.value is not None]
        choose = {"high": max, "low": min}.get(column.best)
        texts.append(choose(rivals)[1] if choose and len({text for _, text in rivals}) > 1 else None)
    return texts


def origin(records: Sequence[Record]) -> str:
    """Hardware, versions, commits and dates of what a table shows."""
    if not records:
        return "Nothing measured yet."
    stamps = [record.stamp for record in records]
    dates = sorted({stamp["date"] for stamp in stamps})
    commits = dict.fromkeys(_commit(stamp) for stamp in sorted(stamps, key=lambda stamp: stamp["date"]))
    parts = (
        "; also ".join(dict.fromkeys(_hardware(record.hardware) for record in records)),
        "; also ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in stamp["versions"].items()) for stamp in stamps)),
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
    )
    return f"{' · '.join(parts)}."


def _commit(stamp: dict) -> str:
    commit = stamp["commit"][:7] if stamp["commit"] else "unknown (installed package)"
    return f"{commit} with uncommitted changes" if stamp["uncommitted_changes"] else commit


def _hardware(hardware: dict) -> str:
    gpu = f"{hardware['gpu']}, " if hardware["gpu"] else ""
    return (
        f"{gpu}{hardware['processor']} (cores: {hardware['cores']}, threads: {hardware['threads']}, "
        f"{hardware['instruction_set']}, {hardware['memory_gib']:g} GiB)"
    )
