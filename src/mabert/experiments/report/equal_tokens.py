"""The comparisons at equal tokens: the baselines, and our own study of scan direction and convolution."""

from mabert.experiments.architectures import BASELINES, MABERTS
from mabert.experiments.report.captions import full_attention
from mabert.experiments.report.collect import Models, Results
from mabert.experiments.report.markup import Figure, Section, Table
from mabert.experiments.report.pretraining import loss_figure, pretraining_table
from mabert.experiments.report.scores import comparison_tables, is_compared, score_table

OTHERS = ("ModernBERT", "MMMMMMMMMMMM", "TTTTTTTTTTTT", "TTTTTTTTTTTT+rope")


def baselines(results: Results) -> Section | None:
    """MaBERT, the paper's five baselines, ModernBERT, and Mamba or attention alone."""
    models = [(name, name) for name in ("MaBERT", *BASELINES, *OTHERS)]
    return _section(results, "baselines", "Baselines at equal tokens", models, full_attention(results))


def directions(results: Results) -> Section | None:
    """MaBERT in each scan direction with each convolution."""
    models = [
        (f"{choices['scan_direction']}, {choices['conv_mode']}{' (MaBERT)' if name == 'MaBERT' else ''}", name)
        for name, choices in MABERTS.items()
    ]
    about = (
        "A study of our own: the paper never says in which direction it scans, nor what its convolution sees. All have "
        "as many parameters outside the embeddings, by the width of the FFN."
    )
    return _section(results, "directions", "Scan direction and convolution", models, about)


def _section(results: Results, name: str, title: str, models: Models, about: str = "") -> Section | None:
    if not is_compared(results, models):
        return None
    blocks: list[Table | Figure] = []
    if any(results.found(results.pretrainings(model)) for _, model in models):
        blocks += [loss_figure(results, name, models), pretraining_table(results, models)]
    if results.scores():
        blocks += [score_table(results, "Tasks", models, {}), *comparison_tables(results, models, "MaBERT")]
    return Section(name, title, blocks, about)
