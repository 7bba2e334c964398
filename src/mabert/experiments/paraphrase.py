"""Continual training on paraphrases: recall before and after, beside controls (arXiv 2510.26912).

A causal model of the scale goes on from its checkpoint, on text of which a share is passages with their paraphrases.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_NAME

from mabert.data.corpus import iter_documents
from mabert.data.next_token import NextTokenDataset
from mabert.data.paraphrase import Augmentation, Pair
from mabert.data.recall import Language
from mabert.data.rows import Rows
from mabert.data.shards import Shards
from mabert.data.tokenizer import load_tokenizer
from mabert.experiments.cells import Cell
from mabert.experiments.scales import ParaphraseScale
from mabert.experiments.sources import Sources
from mabert.experiments.transpoints import TransPoints
from mabert.files import atomic_write, digest
from mabert.inference.loading import load_model
from mabert.training.held_out import evaluate_held_out
from mabert.training.pretrain import PretrainConfig, pretrain
from mabert.training.recall import evaluate_recall

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
        """Every model before, and after each kind of text."""
        for model in self.scale.models:
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

    def before(self, model: str) -> Cell:
        """What the checkpoint recalls."""
        pretrained = self.models.pretraining(model)
        folder = self._folder(pretrained)
        return Cell(
            name=f"paraphrase/{model}/before/0",
            config=self._config(pretrained),
            run=lambda: self._measured(folder),
            needs=(pretrained,),
        )

    def after(self, model: str, augmentation: Augmentation, seed: int) -> Cell:
        """What it recalls after training on such text."""
        pretrained, scale = self.models.pretraining(model), self.scale
        name = label(augmentation)
        output = self.models.work / "paraphrase" / model / name / str(seed)
        return Cell(
            name=f"paraphrase/{model}/{name}/{seed}",
            config=self._config(pretrained)
            | {
                "augmentation": asdict(augmentation),
                "words": self._words,
                "steps": scale.steps,
                "learning_rate": scale.learning_rate,
                "seed": seed,
            },
            run=partial(self._train, self._folder(pretrained), augmentation, seed, output),
            needs=(pretrained,),
            scratch=output,
        )

    @property
    def _words(self) -> int:
        """Of the text that is trained on."""
        causal = self.models.scale
        return round(WORDS_A_TOKEN * self.scale.steps * causal.batch_size * causal.length)

    def _config(self, pretrained: Cell) -> dict[str, Any]:
        return {
            "checkpoint": pretrained.config,
            "pairs": self.sources.pairs_identity(),
            "facts": self.scale.pairs,
            "eval_rows": self.scale.eval_rows,
        }

    @staticmethod
    def _folder(pretrained: Cell) -> Path:
        assert pretrained.artifact is not None
        return pretrained.artifact.parent

    def _train(self, checkpoint: Path, augmentation: Augmentation, seed: int, output: Path) -> dict[str, Any]:
        scale, causal, text = self.scale, self.models.scale, output / "text.txt"
        seeded = Augmentation(**asdict(augmentation) | {"seed": seed})
        train, _ = self.sources.pairs()
        plain = list(iter_documents(self.sources.texts("train")))
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(text, "w") as file:
            documents = seeded.mixed(train, _pieces(plain), self._words)
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
                seed=seed,
                workers=0,
                tensorboard=False,
            ),
            console=self.console,
        )
        return {"tokens": result.tokens} | self._measured(output / "run")

    def _measured(self, folder: Path) -> dict[str, Any]:
        """Recall in the tokens of the tokenizer, what a passage helps, and the weights that it is about."""
        scale, causal = self.scale, self.models.scale
        tokenizer = load_tokenizer(self.sources.tokenizer)
        model = load_model(AutoModelForCausalLM, folder)
        shards = Shards(self.sources.shards / "valid", tokenizer)
        language = Language.of(tokenizer, np.asarray(shards.tokens(0, min(shards.n_tokens, 200_000)), np.int64))
        recall = {}
        for task in self.sources.scale.asked_in_words():
            score = evaluate_recall(model, task, scale.eval_rows, language=language, batch_size=16)
            recall[task.kind] = asdict(score)
        _, held_out = self.sources.pairs()
        chosen = held_out[: scale.eval_rows]
        gains = {name: gain(model, tokenizer, chosen, first, then) for name, (first, then) in GAINS.items()}
        rows = NextTokenDataset([Rows(shards, causal.length, "full-sentences")])
        held = evaluate_held_out(
            model,
            rows,
            [(0, 0, index) for index in range(min(causal.eval_rows, len(rows)))],
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
    """How much better a text is predicted behind another one than at the beginning, in nats a token.

    Args:
        first, then: which of each pair comes first, and which is to be predicted.
    """
    begin = [tokenizer.cls_token_id]
    alone = behind = tokens = 0.0
    for pair in pairs:
        before, target = (tokenizer(pair[part], add_special_tokens=False).input_ids for part in (first, then))
        for context, is_behind in (([], False), (before, True)):
            ids = torch.tensor([[*begin, *context, *target]], device=model.device)
            labels = ids.clone()
            labels[:, : ids.shape[1] - len(target)] = -100
            loss = float(model(ids, labels=labels, use_cache=False).loss) * len(target)
            alone, behind = (alone, behind + loss) if is_behind else (alone + loss, behind)
        tokens += len(target)
    return {"alone": alone / tokens, "behind": behind / tokens, "gain": (alone - behind) / tokens}
