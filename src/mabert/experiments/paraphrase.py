"""Continual training on paraphrases: recall before and after (after arXiv 2510.26912), beside controls of our own.

A causal model of the scale goes on from its checkpoint, on text of which a share is passages with their paraphrases. A
checkpoint of so little text recalls nothing, and nothing could be seen of what becomes of it: so it learns to recall
first, in rows of one task and as much plain text, so that it stays a language model; the others ask whether that
carries over.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from mabert.data.corpus import iter_documents
from mabert.data.next_token import NextTokenDataset
from mabert.data.paraphrase import Augmentation, Pair
from mabert.data.recall import KINDS, Language, RecallTask
from mabert.data.rows import Rows
from mabert.data.shards import Shards
from mabert.data.tokenizer import load_tokenizer
from mabert.experiments.cells import Cell
from mabert.experiments.scales import ParaphraseScale
from mabert.experiments.sources import Sources
from mabert.experiments.transpoints import TransPoints
from mabert.files import atomic_write, digest
from mabert.inference.loading import load_model
from mabert.training.callbacks import say
from mabert.training.held_out import evaluate_held_out
from mabert.training.pretrain import PretrainConfig, pretrain
from mabert.training.recall import EVALUATION_SEED, RECENT, RecallRun, evaluate_recall, train_recall
from mabert.training.runs import publish

TAUGHT = "mqar"
"""The kind of recall that checkpoints learn; the others show what it is worth elsewhere."""
LANGUAGE_TOKENS = 4_000_000
"""Tokens at most, in pieces from all over, of the text that stands between facts and is predicted beside them."""
WORDS_A_TOKEN = 0.7  # about, of WordPiece: the text suffices for the steps about once
GAINS = {"paraphrase": (0, 1), "verbatim": (0, 0)}
"""What a passage is to help with: predicting its paraphrase, and predicting itself."""


@dataclass(frozen=True)
class Paraphrase:
    """The cells of one scale."""

    models: TransPoints

    @property
    def sources(self) -> Sources:
        """Text, pairs, scale."""
        return self.models.sources

    @property
    def scale(self) -> ParaphraseScale:
        """Of the continual training."""
        return self.sources.scale.paraphrase

    @property
    def console(self) -> Console:
        """Where progress goes."""
        return self.models.console

    def cells(self) -> Iterator[Cell]:
        """Every model as it is taught to recall, before any of the texts, and after each kind of them.

        Raises:
            ValueError: there are too few pairs, or a file of them cannot be read: found out before anything is trained.
        """
        train, held_out = self.sources.pairs()
        if len(train) < 3 or len(held_out) < 2:
            raise ValueError(
                f"{len(train)} pairs to train on and {len(held_out)} held out are too few: gaps and controls are made "
                "of other passages."
            )
        for model in self.scale.models:
            if base := self.base(model):
                yield base
            yield self.before(model)
            for augmentation in self.augmentations():
                for seed in range(self.scale.seeds):
                    yield self.after(model, augmentation, seed)

    def augmentations(self) -> Iterator[Augmentation]:
        """Paraphrases by ratio and order, and each control."""
        scale = self.scale
        for kind in scale.kinds:
            ratios = scale.ratios if kind == "paraphrase" else (scale.middle,)
            for ratio in ratios:
                orders = scale.orders if kind == "paraphrase" and ratio == scale.middle else scale.orders[:1]
                for order in orders:
                    yield Augmentation(kind=kind, order=order, ratio=ratio, gap=scale.gap)

    def base(self, model: str) -> Cell | None:
        """The checkpoint, taught to recall; it leaves the model's folder, which everything starts from. None where the
        scale has no steps for that."""
        run = self.scale.teaching()
        if run is None:
            return None
        pretrained = self.models.pretraining(model)
        run = replace(run, bf16=self.sources.scale.bf16 and torch.cuda.is_available())
        folder = self.models.work / "paraphrase" / model / "base" / "0"
        task = next(task for task in self.sources.scale.asked_in_words() if task.kind == TAUGHT)
        return Cell(
            name=f"paraphrase/{model}/base/0",
            config={
                "checkpoint": pretrained.config,
                "task": asdict(task),
                "run": asdict(run),
                "text_shape": self._text_shape(run),
            },
            run=partial(self._teach, self._folder(pretrained), task, run, folder),
            needs=(pretrained,),
            artifact=folder / CONFIG_NAME,
            scratch=folder / "training",
        )

    def before(self, model: str) -> Cell:
        """What is recalled before any of the texts."""
        start = self._start(model)
        return Cell(
            name=f"paraphrase/{model}/before/0",
            config=self._config(start),
            run=partial(self._measured, self._folder(start)),
            needs=(start,),
        )

    def after(self, model: str, augmentation: Augmentation, seed: int) -> Cell:
        """What is recalled after training on such text, which is made with the seed of the training."""
        start, scale, name = self._start(model), self.scale, label(augmentation)
        seeded = replace(augmentation, seed=seed)
        output = self.models.work / "paraphrase" / model / name / str(seed)
        return Cell(
            name=f"paraphrase/{model}/{name}/{seed}",
            config=self._config(start)
            | {
                "augmentation": asdict(seeded),
                "words": self._words,
                "steps": scale.steps,
                "learning_rate": scale.learning_rate,
                "seed": seed,
            },
            run=partial(self._train, self._folder(start), seeded, output),
            needs=(start,),
            scratch=output,
        )

    def _start(self, model: str) -> Cell:
        return self.base(model) or self.models.pretraining(model)

    @property
    def _words(self) -> int:
        """Of the text that is trained on, where there are so many."""
        causal = self.models.scale
        return round(WORDS_A_TOKEN * self.scale.steps * causal.batch_size * causal.length)

    def _config(self, start: Cell) -> dict[str, Any]:
        return {
            "checkpoint": start.config,
            "pairs": self.sources.pairs_identity(),
            "tasks": [asdict(task) for task in self.sources.scale.asked_in_words()],
            "eval_rows": self.scale.eval_rows,
        }

    @staticmethod
    def _folder(start: Cell) -> Path:
        assert start.artifact is not None
        return start.artifact.parent

    def _teach(self, checkpoint: Path, task: RecallTask, run: RecallRun, folder: Path) -> dict[str, Any]:
        tokenizer = load_tokenizer(checkpoint)
        set_seed(run.seed)
        model = load_model(AutoModelForCausalLM, checkpoint)
        state = folder / "training" / "state.pt"
        done = train_recall(
            model,
            [task],
            run,
            partial(say, self.console),
            language=self._language("train"),
            text_shape=self._text_shape(run),
            checkpoint=state,
        )
        publish(model, tokenizer, folder)
        return {
            "lessons": [asdict(lesson) for lesson in done.lessons],
            "taught": done.taught,
            "losses": done.losses[:: max(1, len(done.losses) // 50)],
            "last_loss": fmean(done.losses[-RECENT:]),
            "text_losses": done.text[:: max(1, len(done.text) // 50)],
            "weights": digest(folder / SAFE_WEIGHTS_NAME),
        }

    def _text_shape(self, run: RecallRun) -> tuple[int, int]:
        """As much text as rows of the task, in rows as long as those of pretraining, where held-out text is asked."""
        length = self.models.scale.length
        return max(1, run.tokens // length), length

    def _train(self, checkpoint: Path, augmentation: Augmentation, output: Path) -> dict[str, Any]:
        scale, causal, text = self.scale, self.models.scale, output / "text.txt"
        train, _ = self.sources.pairs()
        plain = list(iter_documents(self.sources.texts("train")))
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(text, "w") as file:
            pieces = _pieces(plain)
            words = min(self._words, sum(len(piece.split()) for piece in pieces))  # a small text is read several times
            documents = augmentation.mixed(train, pieces, words)
            file.write("\n\n".join(" ".join(document.split()) for document in documents) + "\n")
        result = pretrain(
            PretrainConfig(
                train=(str(text),),
                valid=self.sources.texts("valid"),
                tokenizer=self.sources.tokenizer,
                output=output / "run",
                init_from=checkpoint,
                steps=scale.steps,
                batch_size=causal.batch_size,
                micro_batch_size=causal.micro_batch_size,
                stage_lengths=(causal.length,),
                stage_fractions=(1.0,),
                packing="documents",
                learning_rate=scale.learning_rate,
                warmup_fraction=0.1,
                betas=(0.9, 0.95),
                weight_decay=0.1,
                bf16=self.sources.scale.bf16,
                eval_every=scale.steps,
                eval_rows=causal.eval_rows,
                checkpoint_every=max(1, scale.steps // 4),
                seed=augmentation.seed,
                workers=0,
                tensorboard=False,
            ),
            console=self.console,
        )
        return {"tokens": result.tokens, "words": words} | self._measured(output / "run")

    def _measured(self, folder: Path) -> dict[str, Any]:
        """Recall in the tokens of the tokenizer, what a passage helps, and the weights that it is about."""
        scale, causal = self.scale, self.models.scale
        tokenizer = load_tokenizer(self.sources.tokenizer)
        model = load_model(AutoModelForCausalLM, folder)
        language = self._language("valid")
        recall: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for task in self.sources.scale.asked_in_words():
            score = evaluate_recall(model, task, scale.eval_rows, language=language, batch_size=16)
            guessing = task.guessing(scale.eval_rows, EVALUATION_SEED)
            recall[task.kind][str(task.length)] = asdict(score) | {"guessing": guessing}
        _, held_out = self.sources.pairs()
        chosen = held_out[: scale.eval_rows]
        gains = {name: gain(model, tokenizer, chosen, first, then) for name, (first, then) in GAINS.items()}
        rows = NextTokenDataset([Rows(self._shards("valid"), causal.length, "full-sentences")])
        held = evaluate_held_out(
            model,
            rows,
            [(0, 0, index) for index in evenly(causal.eval_rows, len(rows))],
            batch_size=causal.micro_batch_size,
            special_ids=None,
            device=model.device,
        )
        return {
            "held_out_loss": held.loss,
            "recall": recall,
            "gains": gains,
            "weights": digest(folder / SAFE_WEIGHTS_NAME),
        }

    def _language(self, split: str) -> Language:
        """A split's text between the facts. Their words are those of the training text for every split: the ones that
        were taught are asked."""
        taught = Language.of(load_tokenizer(self.sources.tokenizer), self._text("train"))
        return replace(taught, text=self._text(split))

    def _text(self, split: str) -> np.ndarray:
        """Pieces as long as a row, from all over the split: (tokens,) int64."""
        shards, length = self._shards(split), min(self.models.scale.length, LANGUAGE_TOKENS)
        starts = [length * piece for piece in evenly(LANGUAGE_TOKENS // length, -(-shards.n_tokens // length))]
        pieces = [shards.tokens(start, min(start + length, shards.n_tokens)) for start in starts]
        return np.concatenate(pieces).astype(np.int64)

    def _shards(self, split: str) -> Shards:
        return Shards(self.sources.shards / split, load_tokenizer(self.sources.tokenizer))


def evenly(count: int, over: int) -> list[int]:
    """So many of the indices below `over` at equal distances, or all of them where there are fewer."""
    count = min(count, over)
    return [index * over // count for index in range(count)]


def label(augmentation: Augmentation) -> str:
    """The part of a cell's name that tells the text."""
    name = augmentation.kind if augmentation.kind == "none" else f"{augmentation.kind}@{100 * augmentation.ratio:g}"
    return name if augmentation.order == "passage-first" else f"{name},{augmentation.order}"


def _pieces(documents: list[str]) -> list[str]:
    """Paragraphs of documents: about as long as passages with their paraphrases, so that those do not stand out."""
    return [piece for document in documents for piece in document.split("\n") if piece.strip()]


@torch.no_grad()
def gain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], first: int, then: int
) -> dict[str, float]:
    """How much better a text is predicted behind its own passage than behind another one, in nats a token.

    Behind any text a model predicts differently than at the beginning, so that alone is nothing to compare with.

    Args:
        first, then: which of each pair comes first, and which is to be predicted.

    Returns:
        Losses of the text `alone`, `behind` its own passage, and `behind_another`, that of the next pair; `context`,
        what another passage helps; and `gain`, what its own helps beyond that.

    Raises:
        ValueError: there are fewer than two pairs, or nothing to predict.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} held-out pairs are too few: a text is also asked for behind another passage.")
    encoded = [[tokenizer(text, add_special_tokens=False).input_ids for text in pair] for pair in pairs]
    sums, tokens = dict.fromkeys(("alone", "behind", "behind_another"), 0.0), 0
    for pair, another in zip(encoded, encoded[1:] + encoded[:1], strict=True):
        if not (target := pair[then]):
            raise ValueError("a held-out pair has an empty text: there is nothing to predict.")
        contexts = {"alone": [], "behind": pair[first], "behind_another": another[first]}
        for name, context in contexts.items():
            ids = torch.tensor([[tokenizer.cls_token_id, *context, *target]], device=model.device)
            labels = ids.clone()
            labels[:, : ids.shape[1] - len(target)] = -100
            sums[name] += float(model(ids, labels=labels, use_cache=False).loss) * len(target)
        tokens += len(target)
    alone, behind, behind_another = (total / tokens for total in sums.values())
    return {
        "alone": alone,
        "behind": behind,
        "behind_another": behind_another,
        "context": alone - behind_another,
        "gain": behind_another - behind,
    }
