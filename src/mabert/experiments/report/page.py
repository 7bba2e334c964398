"""The page: a summary of what is there and what is not, then every scale with its experiments."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from mabert.experiments.published import SOURCE, TRANSMAMBA
from mabert.experiments.report.collect import Results, read_results
from mabert.experiments.report.drift import drift
from mabert.experiments.report.efficiency import efficiency
from mabert.experiments.report.equal_tokens import baselines, directions
from mabert.experiments.report.grid import grid
from mabert.experiments.report.markup import DASH, Html, Section, element, render_block
from mabert.experiments.report.paper_tables import ablations, budgets, patterns, pooling
from mabert.experiments.report.paraphrase import paraphrase
from mabert.experiments.report.recall import hybrids
from mabert.experiments.report.styles import colour_variables
from mabert.experiments.report.transpoints import transpoints
from mabert.experiments.scales import SCALES
from mabert.experiments.sources import GENERATED
from mabert.files import atomic_write

EXPERIMENTS: dict[str, tuple[str, Callable[[Results], Section | None]]] = {
    "baselines": ("Baselines at equal tokens", baselines),
    "patterns": ("Layer patterns: Table 1", patterns),
    "budgets": ("Pretraining budgets: Figure 3, Tables B1 to B3 and 2", budgets),
    "ablations": ("PSM and MAP: Table 3", ablations),
    "pooling": ("Pooling: Table B4", pooling),
    "drift": ("Drift under padding: Figures 3 and 4", drift),
    "efficiency": ("Efficiency: Figure 5, Tables B5 to B7", efficiency),
    "directions": ("Scan direction and convolution", directions),
    "grid": ("Fine-tuning grid", grid),
    "hybrids": ("Sequential and parallel hybrids, and what they recall", hybrids),
    "paraphrase": ("Training on paraphrases", paraphrase),
    "transpoints": ("TransMamba's schedules: its Tables 5 and 6, its Figure 4", transpoints),
}
TITLE = "The experiments of MaBERT, repeated"


def write_report(results: Path, output: Path) -> Path:
    """Render all results as one HTML file that needs nothing else, and give its path.

    Args:
        results: the folder with one folder a scale.
        output: the file; its folder is made.

    Raises:
        ValueError: there are no results, or a file among them is not the result of a cell; the message names it.
    """
    page = render(read_results(results))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output, "w") as file:
        file.write(page)
    return output


def render(all_results: Sequence[Results]) -> str:
    """The whole page."""
    chapters = {
        results.scale.name: [section for _, make in EXPERIMENTS.values() if (section := make(results))]
        for results in all_results
    }
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'),
        element("title", TITLE),
        element("style", _style()),
    )
    main = element(
        "main",
        element("header", element("h1", TITLE), *_preface(), id="summary"),
        _summary(all_results, chapters),
        *(_chapter(results, chapters[results.scale.name]) for results in all_results),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', _contents(chapters), main), lang='en')}\n"


def _style() -> Html:
    light, dark = colour_variables()
    sheet = files("mabert.experiments.report").joinpath("page.css").read_text(encoding="utf-8")
    return Html(
        f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{sheet}"
    )


def _preface() -> list[Html]:
    paper, transmamba = (
        element("a", source, href=f"https://arxiv.org/abs/{source.split()[-1]}") for source in (SOURCE, TRANSMAMBA)
    )
    return [
        element(
            "p",
            "Every table and figure of MaBERT (",
            paper,
            "), and TransMamba's of schedules and time (",
            transmamba,
            "), by one code at every scale, from pretraining to the score.",
            class_="lead",
        ),
        element(
            "p",
            "Lines marked ",
            element("em", "published"),
            " repeat the paper's numbers as it prints them, means and deviations of five seeds; averages and ratios of "
            "them are computed here. All others were measured by this code. The best of each column is bold, among "
            "ours and among the published. A dash stands for what was not measured, or lacks some of its cells: no "
            "mean is taken over a part of the seeds that any model of its scale has.",
        ),
    ]


def _contents(chapters: dict[str, list[Section]]) -> Html:
    items = [element("li", element("a", "Summary", href="#summary"))]
    for scale, sections in chapters.items():
        inner = [element("li", element("a", s.title, href=f"#{scale}-{s.name}")) for s in sections]
        items.append(element("li", element("a", f"Scale {scale}", href=f"#{scale}"), element("ul", *inner)))
    return element("nav", element("h2", "Contents"), element("ul", *items), aria_label="Contents")


def _summary(all_results: Sequence[Results], chapters: dict[str, list[Section]]) -> Html:
    """How many of the cells of each experiment are there, at each scale."""
    heads = [element("th", "experiment", scope="col", class_="label")]
    heads += [element("th", f"scale {scale}", element("small", "cells"), scope="col") for scale in chapters]
    lines, missing = [], []
    for name, (title, _) in EXPERIMENTS.items():
        fields = []
        for results in all_results:
            scale = results.scale.name
            section = next((section for section in chapters[scale] if section.name == name), None)
            if section is None:
                missing.append(f"{title} (scale {scale})")
                fields.append(element("td", DASH))
                continue
            count = f"{len(results.found(section.wanted))} of {len(section.wanted)}"
            fields.append(element("td", element("a", count, href=f"#{scale}-{name}")))
        lines.append(element("tr", element("th", title, scope="row", class_="label"), *fields))
    missing += [f"anything at scale {scale}" for scale in SCALES if scale not in chapters]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *lines))
    return element(
        "section",
        element("h2", "What is here, and what is not"),
        element("div", table, class_="scroll", tabindex="0"),
        element("p", "Cells that several experiments share count in each of them.", class_="origin"),
        element("p", element("b", "Not measured: "), f"{'; '.join(missing) or 'nothing is left out altogether'}."),
    )


def _chapter(results: Results, sections: Sequence[Section]) -> Html:
    scale = results.scale.name
    return element(
        "section",
        element("h2", f"Scale {scale}"),
        element("p", _setting(results)),
        *(_section(results, section) for section in sections),
        class_="chapter",
        id=scale,
    )


def _section(results: Results, section: Section) -> Html:
    about = [element("p", section.about)] if section.about else []
    blocks = [render_block(block, results) for block in section.blocks]
    return element("section", element("h3", section.title), *about, *blocks, id=f"{results.scale.name}-{section.name}")


def _setting(results: Results) -> str:
    """What was pretrained, on what."""
    found = results.of("pretraining")
    if not found:
        return "No encoder was pretrained at this scale."
    config = next((record for name, record in found.items() if "@" not in name[0]), next(iter(found.values()))).config
    text = config["text"]["text"]
    lengths = " then ".join(f"{length}" for length in config["stage_lengths"])
    sizes = config["size"]
    return (
        f"Twelve layers, hidden size {sizes['hidden_size']}, {sizes['num_attention_heads']} heads. Pretrained for "
        f"{config['steps']:,} steps of {config['batch_size']} rows of {lengths} tokens, on "
        f"{'generated text' if GENERATED in text else ', '.join(text)}, with one vocabulary of up to "
        f"{config['text']['vocab_size']:,}."
    )
