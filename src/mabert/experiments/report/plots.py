"""Plots as SVG whose colours are variables of the page, so that they are right on light and on dark ground."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mabert.experiments.report.markup import Html, element
from mabert.experiments.report.styles import PALETTE, Style

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
except ImportError as cause:
    raise ImportError("the report draws with matplotlib: pip install 'mabert[experiments]'") from cause


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float | None] = ()
    """Of each point; shown as bars, or as a band."""
    failed: Sequence[float] = ()
    """Where along x there is no value, because it did not fit or took too long."""


@dataclass(frozen=True)
class Axis:
    """One of the two axes."""

    label: str
    scale: Literal["linear", "log", "symlog"] = "linear"
    ticks: Sequence[float] = ()
    threshold: float = 1.0
    """Below it a symlog axis is linear."""


def plot(
    name: str,
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    bands: bool = False,
    level: tuple[str, float] | None = None,
) -> Html:
    """Draw lines and give them as an `svg` element.

    Args:
        name: one of its own in the page, for the ids inside.
        description: what is read out instead of it.
        bands: deviations as bands instead of bars.
        level: name and height of a horizontal line.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.edgecolor": _light("quiet"),
        "axes.labelcolor": _light("ink"),
        "xtick.color": _light("quiet"),
        "ytick.color": _light("quiet"),
        "text.color": _light("ink"),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.0, 2.8))
        figure.subplots_adjust(left=0.185, right=0.98, bottom=0.165, top=0.96)
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_light("rule"), linewidth=0.6)
        axes.set_axisbelow(True)
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        for order, line in enumerate(series):
            _draw(axes, line, bands, order)
        if level:
            axes.axhline(level[1], color=_light("quiet"), linestyle=(0, (5, 3)), linewidth=1.1)
            axes.annotate(
                level[0], (0, level[1]), xycoords=("axes fraction", "data"), xytext=(4, -4), textcoords="offset points",
                ha="left", va="top", fontsize=8.5, color=_light("quiet"),
            )  # fmt: skip
        if y.scale == "linear":
            axes.margins(y=0.08)
        if x.ticks:
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, *x.ticks), max(high, *x.ticks))
        file = io.StringIO()
        figure.savefig(file, format="svg")
    return _inline(file.getvalue(), description)


def _draw(axes: Axes, line: Series, bands: bool, order: int) -> None:
    colour = _light(line.style.colour)
    look: dict[str, Any] = {"color": colour, "linewidth": line.style.width, "zorder": 3 + order / 100}
    if line.style.dashes:
        look["linestyle"] = (0, line.style.dashes)
    if line.style.marker:
        look |= {
            "marker": line.style.marker,
            "markevery": max(1, len(line.x) // 5),
            "markersize": 4.5,
            "markeredgecolor": _light("paper"),
            "markeredgewidth": 0.5,
        }
    deviation = [spread or 0.0 for spread in line.deviation]
    if any(deviation) and not bands:
        axes.errorbar(line.x, line.y, deviation, capsize=2.2, elinewidth=0.9, capthick=0.9, **look)
    else:
        axes.plot(line.x, line.y, **look)
    if any(deviation) and bands:
        # nothing that is drawn with a band can be negative
        low = [max(0.0, y - d) for y, d in zip(line.y, deviation, strict=True)]
        high = [y + d for y, d in zip(line.y, deviation, strict=True)]
        axes.fill_between(line.x, low, high, color=colour, alpha=0.14, linewidth=0)
    for x in line.failed:
        axes.plot(
            [x], [0.97 - 0.05 * (order % 4)], "x", color=colour, markersize=6, markeredgewidth=1.6,
            transform=axes.get_xaxis_transform(), clip_on=False, zorder=4,
        )  # fmt: skip


def _set_axis(axes: Axes, which: Literal["x", "y"], axis: Axis) -> None:
    ticker = axes.xaxis if which == "x" else axes.yaxis
    ticker.set_label_text(axis.label)
    options: dict[str, Any] = {
        "log": {"base": 2 if axis.ticks else 10},
        "symlog": {"base": 2, "linthresh": axis.threshold},
    }
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    set_scale(axis.scale, **options.get(axis.scale, {}))
    if axis.ticks:
        ticker.set_major_locator(FixedLocator(list(axis.ticks)))
        ticker.set_minor_locator(NullLocator())
    elif axis.scale == "log":
        ticker.set_major_locator(LogLocator(10, subs=(1, 3)))
        ticker.set_minor_formatter(NullFormatter())
    if axis.ticks or axis.scale == "log":
        ticker.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ticker.set_tick_params(which="both", length=2.5)


def _light(name: str) -> str:
    return PALETTE[name][0]


def _inline(svg: str, description: str) -> Html:
    """What matplotlib wrote, as part of a page: no declaration, no fixed size, the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib gives every figure a viewBox"
    # every plot would have these ids and this style, and the page has a font
    body = re.sub(r' id="[A-Za-z0-9]+(?:\.[A-Za-z]+)?_\d+"', "", body)
    body = re.sub(r"<style.*?</style>|font-family: [^;\"]*;? ?", "", body, flags=re.DOTALL)
    body = re.sub(r"\n\s*", "\n", body).replace("xlink:href", "href")
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    label = element("title", description)
    return Html(f'<svg {box[0]} role="img">{label}{body.strip()}')
