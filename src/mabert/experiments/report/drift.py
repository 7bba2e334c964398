"""How far padding moves what a trained model says of a sentence: the paper's Figures 3 and 4 of Section 4.4."""

from collections.abc import Sequence

from mabert.experiments.architectures import MABERTS
from mabert.experiments.drift import MEASURES
from mabert.experiments.report.captions import at_scale, trained_again
from mabert.experiments.report.collect import Record, Results
from mabert.experiments.report.markup import DASH, Column, Entry, Figure, Panel, Row, Section, Table
from mabert.experiments.report.plots import Axis, Series, plot
from mabert.experiments.report.styles import MODES, key

ABOUT = (
    "Cosine distance between a sentence's vector with pads and without any, by the same weights. The paper calls its "
    "second panel “unmasked mean” and says in words that pads are left out; both readings are here. It finds masking "
    "after the block better than masking before the scan, and both together best. By its own equations the mask after "
    "the block changes no valid token where the one before the scan is in place, as long as attention masks pad keys. "
    "What was found here stands below each figure."
)


def drift(results: Results) -> Section | None:
    """One figure for each direction, convolution and side of the pads."""
    cells = results.of("drift")
    if not cells:
        return None
    planned = [
        (name, f"{choices['scan_direction']}-{choices['conv_mode']}", side)
        for name, choices in MABERTS.items()
        if choices["scan_direction"] in ("forward", "bidirectional")
        for side in ("right", "left")
    ]
    names = [*planned, *sorted(cells.keys() - set(planned))]
    figures = [_figure(results, name, cells[name]) for name in names if name in cells]
    return Section("drift", "Drift under padding", [_table(results, names), *figures], ABOUT)


def _about(results: Results, records: Sequence[Record]) -> str:
    data = dict.fromkeys(f"{record.at('rows'):,} rows of {record.at('data')}" for record in records)
    return f"{at_scale(results)}; {', '.join(data)}; one pretrained model each."


def _figure(results: Results, name: tuple[str, ...], record: Record) -> Figure:
    _, setting, side = name
    pads = record.at("pads")
    modes = [mode for mode in MODES if mode in record.at("modes")]
    x = Axis(f"pads on the {side}", "symlog", pads, threshold=pads[1] if len(pads) > 1 else 1)
    panels = []
    for letter, (measure, vector) in zip("abc", MEASURES.items(), strict=True):
        means, spreads = ([record.at("modes", mode, measure, what) for mode in modes] for what in ("mean", "std"))
        svg = plot(
            f"{results.scale.name}-drift-{setting}-{side}-{measure}",
            f"Mean cosine distance of {vector} by pads on the {side}, one line a psm mode",
            [Series(mode, MODES[mode], pads, *drawn) for mode, *drawn in zip(modes, means, spreads, strict=True)],
            x,
            Axis("mean cosine distance"),
            bands=True,
        )
        panels.append(Panel(f"({letter}) {vector}", svg))
    title = f"Figures 3 and 4 (drift) · {setting.replace('-', ' scan, ')} convolution, pads on the {side}"
    caption = f"Bands: ± standard deviation over the sentences. {_about(results, [record])}"
    legend = key((mode, MODES[mode]) for mode in modes)
    return Figure(title, caption, legend, panels, [_cell(name)], record.at("findings"))


def _table(results: Results, names: Sequence[tuple[str, ...]]) -> Table:
    cells = results.of("drift")
    modes = ("none", "pre", "post", "pre+post", "exact", "packed")
    rows = []
    for name in names:
        entries = [_at_most_pads(cells[name], mode) if name in cells else Entry(DASH) for mode in modes]
        rows.append(Row(f"{name[1].replace('-', ', ')}, {name[2]}", entries))
    found = [cells[name] for name in names if name in cells]
    most = " or ".join(dict.fromkeys(str(record.at("pads")[-1]) for record in found))
    caption = (
        f"Mean cosine distance of [CLS] at {most} pads, with the largest of any sentence. {_about(results, found)}"
    )
    columns = [Column(mode) for mode in modes]
    wanted = [_cell(name) for name in names]
    return Table(
        "Drift of [CLS] at the most pads",
        caption,
        columns,
        rows,
        wanted,
        trained_again(results, wanted),
        head="scan, convolution, pads",
    )


def _cell(name: tuple[str, ...]) -> str:
    return "/".join(("drift", *name))


def _at_most_pads(record: Record, mode: str) -> Entry:
    if mode not in record.at("modes"):
        return Entry(DASH)
    mean, largest = (record.at("modes", mode, "cls", what)[-1] for what in ("mean", "max"))
    return Entry(_short(mean), f"({_short(largest)})")


def _short(value: float) -> str:
    """As "3.2e−5"; zero stays plain."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−") if value else "0"
