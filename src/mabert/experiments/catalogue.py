"""Every experiment as the list of its cells. Cells that several of them share are computed once."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mabert.experiments.architectures import BASELINES, MABERTS
from mabert.experiments.cells import Cell
from mabert.experiments.drift import drift_cells
from mabert.experiments.efficiency import efficiency_cells
from mabert.experiments.finetuning import Contender, Finetuning
from mabert.experiments.paraphrase import Paraphrase
from mabert.experiments.pretraining import Pretraining
from mabert.experiments.recall import Recall
from mabert.experiments.scales import Scale
from mabert.experiments.transpoints import TransPoints

logger = logging.getLogger(__name__)

PATTERN = "MMTMMTMMTMMT"
# CHOICE: Tables 3 and B4 with both convolutions, since the text leaves open which one the paper's model has
ABLATED = ("MaBERT", "MaBERT-forward-causal")
PSM, NO_PSM = "pre+post", "none"


@dataclass(frozen=True)
class Suite:
    """The experiments at one scale."""

    scale: Scale
    pretraining: Pretraining
    finetuning: Finetuning

    def patterns(self) -> Iterator[Cell]:
        """Table 1: eight schedules of layers, pretrained for a tenth of the steps."""
        yield from self._compared([named(pattern) for pattern in self.scale.patterns], self.scale.pattern_budget)

    def budgets(self) -> Iterator[Cell]:
        """Figure 3, Tables B1 to B3 and 2: six models after four budgets of pretraining."""
        for budget in self.scale.budgets:
            yield from self._compared(BASELINES, budget)

    def ablations(self) -> Iterator[Cell]:
        """Table 3: with and without PSM and MAP, from one checkpoint."""
        yield from self._ablated([(psm, pooling) for psm in (PSM, NO_PSM) for pooling in ("map", "cls")])

    def pooling(self) -> Iterator[Cell]:
        """Table B4: four ways to pool, from one checkpoint."""
        yield from self._ablated([(PSM, pooling) for pooling in ("map", "attention", "cls", "mean")])

    def drift(self) -> Iterator[Cell]:
        """Figures 3 and 4 (drift): how far padding moves what a trained model says of a sentence."""
        pretrained = {
            name: self.pretraining.cell(name)
            for name, choices in MABERTS.items()
            if choices["scan_direction"] in ("forward", "bidirectional")
        }
        yield from drift_cells(self.scale, pretrained, self.pretraining.sources.sentences)

    def efficiency(self) -> Iterator[Cell]:
        """Figure 5, Tables B5 to B7: time and memory by length."""
        yield from efficiency_cells(self.scale)

    def baselines(self) -> Iterator[Cell]:
        """Encoders of equal size after equal tokens: held-out loss and tasks."""
        names = ("MaBERT", *BASELINES, "ModernBERT", "MMMMMMMMMMMM", "TTTTTTTTTTTT", "TTTTTTTTTTTT+rope")
        yield from self._compared(names)

    def directions(self) -> Iterator[Cell]:
        """Our own study: scan direction and convolution, at equal parameters and tokens."""
        yield from self._compared(MABERTS)

    def transpoints(self) -> Iterator[Cell]:
        """TransMamba's Tables 5 and 6 and its Figure 4: loss by schedule, time by length and by TransPoint."""
        yield from self._transpoints.cells()

    def hybrids(self) -> Iterator[Cell]:
        """Sequential and parallel hybrids as language models, at equal parameters and tokens."""
        yield from self._transpoints.hybrids()

    def recall(self) -> Iterator[Cell]:
        """What each architecture recalls, by task, length and place, and through which memory."""
        yield from Recall(self.scale, self.pretraining.console, self.pretraining.work).cells()

    def paraphrase(self) -> Iterator[Cell]:
        """Recall before and after continual training on paraphrases, beside controls."""
        yield from Paraphrase(self._transpoints).cells()

    @property
    def _transpoints(self) -> TransPoints:
        return TransPoints(self.pretraining.sources, self.pretraining.work, self.pretraining.console)

    def all(self) -> Iterator[Cell]:
        """Everything that there are data for."""
        for name in EXPERIMENTS:
            if name == "paraphrase" and not self.pretraining.sources.has_pairs:
                logger.warning("paraphrase is left out: %s has no folder paraphrase/", self.pretraining.sources.data)
            elif name != "all":
                yield from self._of_this_machine(EXPERIMENTS[name](self), name)

    def _of_this_machine(self, cells: Iterable[Cell], name: str) -> Iterator[Cell]:
        """Without times where some were measured on another machine: those of two are not of one table."""
        cells, store = list(cells), self.finetuning.store
        for cell in cells:
            there = store.machine(cell) if cell.alone else {}
            here = {key: cell.config.get(key) for key in there}
            if there != here:
                logger.warning(
                    "%s: times are left out. %s is of %s, and this is %s: name another results folder to measure here.",
                    *(name, store.path(cell), there, here),
                )
                cells = [cell for cell in cells if not cell.alone]
                break
        yield from cells

    def _compared(self, names: Iterable[str], budget: float = 1.0) -> Iterator[Cell]:
        """The models' scores, and how MaBERT differs from each."""
        names = dict.fromkeys(["MaBERT", *names])
        yield from self._contest([Contender(self.pretraining.checkpoints(name, budget)) for name in names])

    def _ablated(self, variants: list[tuple[str, str]]) -> Iterator[Cell]:
        """The variants' scores, and how the first one differs from each."""
        for name in ABLATED:
            checkpoints = self.pretraining.checkpoints(name)
            yield from self._contest(
                [Contender(checkpoints, {"psm": psm, "pooling": pooling}) for psm, pooling in variants]
            )

    def _contest(self, contenders: Sequence[Contender]) -> Iterator[Cell]:
        first, *others = contenders
        for one in contenders:
            for checkpoint in one.checkpoints:
                yield from checkpoint.needs
            yield from self.finetuning.scores(one.checkpoints, one.variant)
        for other in others:
            for task in self.finetuning.sources.tasks:
                yield self.finetuning.comparison(first, other, task)


def named(pattern: str) -> str:
    """The name of a pattern's architecture."""
    return "MaBERT" if pattern == PATTERN else pattern


EXPERIMENTS: dict[str, Callable[[Suite], Iterator[Cell]]] = {
    name: getattr(Suite, name)
    for name in (
        "patterns",
        "budgets",
        "ablations",
        "pooling",
        "drift",
        "efficiency",
        "baselines",
        "directions",
        "transpoints",
        "hybrids",
        "recall",
        "paraphrase",
        "all",
    )
}


def cells_of(names: Iterable[str], suite: Suite) -> list[Cell]:
    """The cells of these experiments and what they need, each once."""
    found: dict[Cell, None] = {}

    def add(cell: Cell) -> None:
        if cell not in found:
            for need in cell.needs:
                add(need)
            found[cell] = None

    for name in names:
        for cell in EXPERIMENTS[name](suite):
            add(cell)
    return list(found)
