"""How everything is drawn: the colours, and one style for each model in all figures."""

from collections.abc import Iterable
from dataclasses import dataclass

from mabert.experiments.report.markup import Html, element, joined

# Name -> on light ground, on dark ground. Told apart by readers with any of the usual colour deficiencies, with the
# help of the markers.
PALETTE = {
    "ink": ("#1b1e23", "#e4e6ea"),
    "quiet": ("#5f6670", "#a2a9b4"),
    "rule": ("#d5d8dd", "#3a4048"),
    "paper": ("#fffffe", "#16191d"),
    "vermillion": ("#c8410e", "#ff8a57"),
    "blue": ("#0b62a8", "#62b1f2"),
    "sky": ("#4aa3d4", "#9fd8f7"),
    "green": ("#00836a", "#3fcaa5"),
    "amber": ("#c28400", "#f0bd4c"),
    "rose": ("#b3528c", "#ea9fca"),
    "indigo": ("#5747b0", "#ab9ff2"),
    "brown": ("#7c5a2b", "#cca977"),
    "grey": ("#59606b", "#b4bac4"),
}


@dataclass(frozen=True)
class Style:
    """How one model is drawn in every figure."""

    colour: str
    marker: str = "o"
    dashes: tuple[float, ...] = ()
    width: float = 1.4


MARKERS = {
    "o": '<circle cx="14" cy="6" r="3.2"/>',
    "s": '<rect x="11" y="3" width="6" height="6"/>',
    "^": '<path d="M14 2L18 9H10Z"/>',
    "v": '<path d="M14 10L18 3H10Z"/>',
    "D": '<path d="M14 1.6L18.2 6L14 10.4L9.8 6Z"/>',
    "p": '<path d="M14 2L18 5L16.5 9.6H11.5L10 5Z"/>',
    "": "",
}

_CONVOLUTIONS: dict[str, tuple[float, ...]] = {"centered": (), "causal": (3, 1.5)}
_DIRECTIONS = {
    "forward": ("vermillion", "o"),
    "backward": ("blue", "s"),
    "alternating": ("green", "v"),
    "bidirectional": ("rose", "D"),
}
STYLES = {
    "BERT": Style("blue", "s"),
    "ALBERT": Style("sky", "^"),
    "Longformer": Style("green", "v"),
    "BigBird": Style("amber", "D"),
    "DeBERTa": Style("rose", "p"),
    "ModernBERT": Style("indigo", "s"),
    "MMMMMMMMMMMM": Style("brown", "^"),
    "TTTTTTTTTTTT": Style("grey", "v"),
    "TTTTTTTTTTTT+rope": Style("grey", "D", (3, 1.5)),
    **{
        f"MaBERT-{direction}-{convolution}": Style(colour, marker, dashes)
        for direction, (colour, marker) in _DIRECTIONS.items()
        for convolution, dashes in _CONVOLUTIONS.items()
    },
    "MaBERT": Style("vermillion", "o", width=2.2),
    "Transformer": Style("grey", "v"),
    "Mamba-2": Style("brown", "^"),
    "Hybrid": Style("blue", "s"),
    **{
        f"TransMamba-V{n}": Style(colour, marker, (3, 1.5))
        for n, (colour, marker) in enumerate(
            [
                ("sky", "o"),
                ("green", "o"),
                ("amber", "o"),
                ("rose", "s"),
                ("indigo", "s"),
                ("sky", "s"),
                ("green", "D"),
                ("amber", "D"),
            ],
            start=1,
        )
    },
    "TransMamba-V9": Style("vermillion", "o", width=2.2),
    "sequential": Style("blue", "s", width=2.0),
    "sequential-attention-first": Style("sky", "s", (3, 1.5)),
    **{
        f"parallel-{fusion}": Style(colour, marker, dashes)
        for fusion, colour, marker, dashes in (
            ("mean", "green", "o", ()),
            ("gate", "amber", "D", ()),
            ("merge-attention", "vermillion", "o", ()),
            ("scaled", "rose", "p", ()),
            ("concat", "indigo", "v", ()),
            ("merge-attention-swapped", "vermillion", "^", (3, 1.5)),
        )
    },
}
"""Of each model."""

MODES = {
    # what coincides stays visible: the wider lines lie below
    "exact": Style("green", "", width=5.0),
    "pre+post": Style("sky", "", width=3.6),
    "pre": Style("amber", "s", width=1.8),
    "post": Style("rose", "v"),
    "none": Style("ink", "o"),
    "packed": Style("quiet", "", (2, 2)),
}
"""Of each way to mask pads."""


def style(name: str) -> Style:
    """Of a model."""
    return STYLES.get(name, Style("quiet"))


def key(names: Iterable[tuple[str, Style]]) -> Html:
    """What is drawn how, in one line that wraps."""
    items = []
    for name, style in names:
        dashes = (
            f' stroke-dasharray="{" ".join(str(length * style.width) for length in style.dashes)}"'
            if style.dashes
            else ""
        )
        sample = Html(
            f'<svg viewBox="0 0 28 12" aria-hidden="true" style="color: var(--{style.colour})">'
            f'<path d="M0 6H28" stroke="currentColor" stroke-width="{style.width + 0.4}"{dashes}/>'
            f'<g fill="currentColor">{MARKERS[style.marker]}</g></svg>'
        )
        items.append(element("li", sample, name))
    return element("ul", joined(items), class_="key")


def colour_variables() -> tuple[str, str]:
    """The palette as CSS declarations, on light and on dark ground."""
    light, dark = (" ".join(f"--{name}: {pair[ground]};" for name, pair in PALETTE.items()) for ground in (0, 1))
    return light, dark
