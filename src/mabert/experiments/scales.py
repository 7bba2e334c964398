"""The sizes at which the experiments run: one set of choices each, everything else is the same code."""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from mabert.causal_config import SSMS, TRANSPOINTS
from mabert.config import FUSIONS, MaBertConfig
from mabert.data.glue import glue_task
from mabert.data.paraphrase import Augmentation
from mabert.data.recall import KINDS, RecallTask
from mabert.training.finetune_config import FinetuneConfig
from mabert.training.pretrain_config import PretrainConfig
from mabert.training.recall import RecallRun

LAYERS = 12
LETTERS = "MTP"
PATTERNS = (
    "MMMMMMMMMMMM",
    "TTTTTTTTTTTT",
    "MTTMTTMTTMTT",
    "TMTMTMTMTMTM",
    "MTMTMTMTMTMT",
    "TMMTMMTMMTMM",
    "MMTMMTMMTMMT",
    "TTMTTMTTMTTM",
)
"""The eight of Table 1."""

WORDS = 72
"""Ids of a recall task that is asked in the words of a tokenizer."""

HYBRID_NAMES = (
    "Transformer",
    "Mamba-2",
    "sequential",
    "sequential-attention-first",
    *(f"parallel-{f}" for f in FUSIONS),
)
"""Causal models of attention and SSM: each alone, one after the other, side by side."""


def _check_heads(scale: str, hidden_size: int, heads: int) -> None:
    if hidden_size % (2 * heads):
        raise ValueError(
            f"{scale}.hidden_size={hidden_size} must be an even number for each of num_attention_heads={heads}."
        )


def _check_mixers(scale: str, ssm: str, sliding_window: int | None) -> None:
    if ssm not in SSMS:
        raise ValueError(f"{scale}.ssm={ssm!r} is not one of {', '.join(SSMS)}.")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{scale}.sliding_window={sliding_window} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class CausalScale:
    """How large the causal language models of a scale are, and how they are trained; the defaults are TransMamba's."""

    hidden_size: int = 1536
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    """Of TransMamba; the references' is chosen so that all have as many parameters outside the embeddings."""
    layers: int = 24
    length: int = 8192
    """Tokens of a row, which is one sequence."""
    steps: int = 9_900
    batch_size: int = 1024
    micro_batch_size: int = 2
    learning_rate: float = 2.5e-4
    eval_rows: int = 128
    schedules: tuple[str, ...] = tuple(TRANSPOINTS)
    ssm: str = "mamba2"
    """The SSM of the references and the hybrids when they are pretrained, also of the one that is named Mamba-2: or
    "mamba1"."""
    sliding_window: int | None = None
    """Tokens that their attention reaches, itself included; all of them by default."""
    seeds: int = 1
    """Of pretraining."""

    timed: str = "base"
    """The scale whose models are timed."""
    timed_lengths: tuple[int, ...] = (2048, 4096, 8192)
    timed_points: int = 9
    """TransPoints between nothing and the whole length at which a layer is timed."""

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "layers",
            "steps",
            "batch_size",
            "micro_batch_size",
            "eval_rows",
            "seeds",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"causal.{name}={getattr(self, name)} must be at least 1.")
        if self.length < 4:
            raise ValueError(f"causal.length={self.length} must be at least 4 tokens.")
        if not self.learning_rate > 0:
            raise ValueError(f"causal.learning_rate={self.learning_rate} must be above 0.")
        for name in ("schedules", "timed_lengths"):
            if not getattr(self, name):
                raise ValueError(f"causal.{name} is empty: give at least one.")
        if min(self.timed_lengths) < 1:
            raise ValueError(f"causal.timed_lengths={self.timed_lengths} must be at least 1 each.")
        _check_heads("causal", self.hidden_size, self.num_attention_heads)
        _check_mixers("causal", self.ssm, self.sliding_window)
        if self.timed_points < 2:
            raise ValueError(
                f"causal.timed_points={self.timed_points} must be at least 2: nothing, and the whole length."
            )
        if self.layers % 4:
            raise ValueError(
                f"causal.layers={self.layers} must be a multiple of 4: the layer hybrid has an attention layer in four."
            )
        if unknown := [name for name in self.schedules if name not in TRANSPOINTS]:
            raise ValueError(f"there is no schedule {unknown[0]!r}. There are {', '.join(TRANSPOINTS)}.")
        if self.timed not in SCALES:
            raise ValueError(f"causal.timed={self.timed!r} is not one of {', '.join(SCALES)}.")


@dataclass(frozen=True, kw_only=True)
class RecallScale:
    """How large the models are that learn to recall, how they are trained, and what they are asked."""

    hidden_size: int = 64
    num_attention_heads: int = 4
    intermediate_size: int = 256
    layers: int = 4
    """Mixers of a model; a layer that has two counts twice. Recall takes two layers at least: one that tells a value
    which key stood before it, and one that finds it."""
    state_size: int | None = None
    """Of the SSM; by default as wide as a head of attention. The smaller, the fewer facts a state holds."""
    ssm: str = "mamba2"
    """The mixer that stands beside attention, and alone in the model that is named Mamba-2: or "mamba1"."""
    sliding_window: int | None = None
    """Tokens that attention reaches, itself included; all of them by default."""
    vocab_size: int = 128

    kinds: tuple[str, ...] = ("mqar", "phonebook", "passkey")
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    """Of the rows, in training and when asked."""
    beyond: tuple[int, ...] = (1_024,)
    """Lengths of rows that are asked only: longer than any in training."""
    pairs: tuple[int, ...] = (4, 16)
    """Facts in a row, as far as they find room."""
    lessons: tuple[int, ...] = (0, 2, 4, 8, 16)
    """Facts in the rows of each lesson, which hold nothing else; 0 for one in which a text comes twice."""
    lesson_steps: tuple[int, ...] = (2_000, 200, 200, 200, 200)
    """Of each of them."""
    lesson_tokens: int = 2_048
    """In the rows of a lesson's step."""
    copied: int = 24
    """Tokens in a row in which a text comes twice."""
    steps: int = 4_000
    """After the lessons, on rows of all lengths and numbers of facts in turns."""
    tokens: int = 8_192
    """In the rows of such a step."""
    learning_rate: float = 2e-3
    seeds: int = 5
    eval_rows: int = 512

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "steps", "tokens", "seeds", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"recall.{name}={getattr(self, name)} must be at least 1.")
        if self.state_size is not None and self.state_size < 1:
            raise ValueError(f"recall.state_size={self.state_size} must be at least 1.")
        if self.layers < 4 or self.layers % 2:
            raise ValueError(
                f"recall.layers={self.layers} must be even and at least 4: half of the models have two mixers in a "
                "layer, and one layer cannot recall."
            )
        _check_heads("recall", self.hidden_size, self.num_attention_heads)
        _check_mixers("recall", self.ssm, self.sliding_window)
        for name in ("kinds", "lengths", "pairs"):
            if not getattr(self, name):
                raise ValueError(f"recall.{name} is empty: give at least one.")
        if self.beyond and min(self.beyond) <= max(self.lengths):
            raise ValueError(
                f"recall.beyond={self.beyond} must be longer than the rows of training, lengths={self.lengths}."
            )
        for kind in self.kinds:
            asked = {task.length for task in self.tasks(kind)}
            for length in self.lengths:
                if length not in asked:
                    raise ValueError(
                        f"recall: rows of {length} tokens have no room for {kind} with any of pairs={self.pairs}: give "
                        "fewer facts or longer rows."
                    )
            self.run().lessons_for(self.tasks(kind)[0])  # which are refused where there are too few words
        used = {task.pairs for kind in self.kinds for task in self.tasks(kind)}
        if set(self.kinds) != {"passkey"} and (unused := sorted(set(self.pairs) - used)):
            raise ValueError(
                f"recall: {unused[0]} facts find no room in any row of lengths={self.lengths}: give fewer facts or "
                "longer rows."
            )

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths + self.beyond)

    def run(self, seed: int = 0) -> RecallRun:
        """How a model of a seed is trained."""
        return RecallRun(
            lessons=self.lessons,
            lesson_steps=self.lesson_steps,
            lesson_tokens=self.lesson_tokens,
            copied=self.copied,
            steps=self.steps,
            tokens=self.tokens,
            learning_rate=self.learning_rate,
            seed=seed,
        )

    def tasks(self, kind: str) -> list[RecallTask]:
        """What is trained on: each number of facts at each length that has room for it."""
        return self._tasks(kind, self.lengths)

    def asked(self, kind: str) -> list[RecallTask]:
        """What is asked: that, and what is longer."""
        return self._tasks(kind, self.lengths + self.beyond)

    def _tasks(self, kind: str, lengths: tuple[int, ...]) -> list[RecallTask]:
        found = []
        for pairs in (1,) if kind == "passkey" else self.pairs:
            shortest = RecallTask.shortest(kind=kind, pairs=pairs, vocab_size=self.vocab_size)
            found += [replace(shortest, length=length) for length in lengths if length >= shortest.length]
        return found


@dataclass(frozen=True, kw_only=True)
class ParaphraseScale:
    """How the causal models of a scale go on training on paraphrases."""

    models: tuple[str, ...] = ("Transformer", "sequential", "parallel-merge-attention")
    kinds: tuple[str, ...] = ("none", "paraphrase", "verbatim", "unrelated", "apart")
    ratios: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Of paraphrases; the controls take the middle one."""
    orders: tuple[str, ...] = ("passage-first", "paraphrase-first")
    """Of paraphrases at the middle ratio; everything else takes the first one."""
    gap: tuple[int, int] = (0, 30)
    steps: int = 500
    learning_rate: float = 2e-4
    seeds: int = 3
    eval_rows: int = 256
    pairs: int = 4
    """Facts in a row of the recall tasks."""
    taught: int = 1_000
    """Steps in which a checkpoint learns to copy before all this, then facts, then the task: of each; 0 for none."""
    taught_tokens: int = 8_192
    """In the rows of such a step, and as many of plain text."""
    taught_learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("models", "kinds", "ratios", "orders"):
            if not getattr(self, name):
                raise ValueError(f"paraphrase.{name} is empty: give at least one.")
        for name in ("steps", "seeds", "pairs", "taught_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"paraphrase.{name}={getattr(self, name)} must be at least 1.")
        if self.eval_rows < 2:
            raise ValueError(
                f"paraphrase.eval_rows={self.eval_rows} must be at least 2: a pair is compared with another one."
            )
        if self.taught < 0:
            raise ValueError(f"paraphrase.taught={self.taught} must not be negative.")
        for name in ("learning_rate", "taught_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"paraphrase.{name}={getattr(self, name)} must be above 0.")
        for kind in self.kinds:
            for order in self.orders:
                for ratio in self.ratios:
                    Augmentation(kind=kind, order=order, ratio=ratio, gap=self.gap)
        if unknown := [name for name in self.models if name not in HYBRID_NAMES]:
            raise ValueError(f"paraphrase.models: there is no {unknown[0]!r}. There are {', '.join(HYBRID_NAMES)}.")

    @property
    def middle(self) -> float:
        """The ratio of all but one comparison."""
        return self.ratios[len(self.ratios) // 2]

    def teaching(self) -> RecallRun | None:
        """How a checkpoint learns to recall: to copy, then facts that stand side by side, then the task; None: not."""
        if not self.taught:
            return None
        return RecallRun(
            lessons=(0, self.pairs),
            lesson_steps=(self.taught, self.taught),
            lesson_tokens=self.taught_tokens,
            steps=self.taught,
            tokens=self.taught_tokens,
            learning_rate=self.taught_learning_rate,
        )


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Every choice that makes an experiment large or small; the defaults are the paper's."""

    name: str
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    """Of MaBERT; below base the other models' is chosen so that all have as many parameters outside the embeddings."""
    match_parameters: bool = True
    vocab_size: int = 30522

    steps: int = 1_000_000
    """Optimizer steps of a whole pretraining run."""
    batch_size: int = 256
    micro_batch_size: int = 32
    stage_lengths: tuple[int, ...] = (128, 512)
    stage_fractions: tuple[float, ...] = (0.9, 0.1)
    learning_rate: float = 6e-4
    warmup_fraction: float = 0.024
    bf16: bool = True
    eval_rows: int = 2_048
    text_lines: int | None = None
    """Lines to take from the beginning of each training text; all by default."""
    pretraining_seeds: int = 1

    budgets: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    patterns: tuple[str, ...] = PATTERNS
    pattern_budget: float = 0.1
    """Share of the steps that Table 1's patterns are pretrained for."""

    tasks: tuple[str, ...] = ("CoLA", "SST-2", "MRPC", "QQP", "MNLI", "QNLI", "RTE")
    max_train_rows: int | None = None
    max_length: int = 128
    finetuning_seeds: int = 5
    # CHOICE: the paper is silent on fine-tuning; BERT's grid, in which RoBERTa's lies, chosen on a part of train
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 3e-5, 5e-5)
    batch_sizes: tuple[int, ...] = (16, 32)
    epochs: tuple[int, ...] = (3, 10)

    efficiency_scale: str = "base"
    """The scale whose models are timed: the paper's, wherever that can be done."""
    efficiency_lengths: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    efficiency_training_lengths: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    cell_seconds: float = 120.0
    """A timing cell repeats for so long at most."""
    repetitions: int = 100
    """A timing cell repeats so often at most."""
    drift_rows: int | None = None
    """Sentences whose drift is measured; the whole dev set by default."""
    causal: CausalScale = field(default_factory=CausalScale)
    recall: RecallScale = field(default_factory=RecallScale)
    paraphrase: ParaphraseScale = field(default_factory=ParaphraseScale)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "pretraining_seeds", "finetuning_seeds", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("stage_lengths", "budgets", "patterns", "tasks", "learning_rates", "batch_sizes", "epochs"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one.")
        object.__setattr__(self, "tasks", tuple(glue_task(task).name for task in self.tasks))
        self._check_patterns_and_measurements()
        self._check_trainings()
        try:
            self.asked_in_words()
        except ValueError as error:
            raise ValueError(
                f"paraphrase asks for {self.paraphrase.pairs} facts in a quarter of causal.length="
                f"{self.causal.length}, in {WORDS} words: {error}"
            ) from error
        if self.efficiency_scale not in SCALES:
            raise ValueError(f"efficiency_scale={self.efficiency_scale!r} is not one of {', '.join(SCALES)}.")

    def _check_patterns_and_measurements(self) -> None:
        for pattern in self.patterns:
            if len(pattern) != LAYERS or set(pattern) - set(LETTERS):
                raise ValueError(f"patterns: {pattern!r} must be {LAYERS} letters of {', '.join(LETTERS)}.")
        for name in ("efficiency_lengths", "efficiency_training_lengths"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 each.")
        if not self.cell_seconds > 0:
            raise ValueError(f"cell_seconds={self.cell_seconds} must be above 0.")
        if self.drift_rows is not None and self.drift_rows < 1:
            raise ValueError(f"drift_rows={self.drift_rows} must be at least 1, or none for all.")

    def _check_trainings(self) -> None:
        """Build every config once that a training will have: each says itself what is wrong with it."""
        pretraining: dict[str, Any] = {
            "model": mabert_config(self),
            "stage_lengths": self.stage_lengths,
            "stage_fractions": self.stage_fractions,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "learning_rate": self.learning_rate,
            "warmup_fraction": self.warmup_fraction,
            "eval_rows": self.eval_rows,
            "packing": "full-sentences",
        }
        finetuning: dict[str, Any] = {"max_length": self.max_length, "max_train_rows": self.max_train_rows}
        pretraining |= {"train": "-", "tokenizer": "-", "output": "-"}
        finetuning |= {"train": "-", "model": "-", "output": "-"}
        for budget in (*self.budgets, self.pattern_budget):
            PretrainConfig(**pretraining, budget=budget)
        for rate, size, epochs in product(self.learning_rates, self.batch_sizes, self.epochs):
            grid: dict[str, Any] = {"learning_rate": rate, "batch_size": size, "epochs": epochs}
            FinetuneConfig(**finetuning, **grid)

    def asked_in_words(self) -> list[RecallTask]:
        """What `paraphrase` asks of a model in the words of its tokenizer: in rows of a quarter of its length, which
        are those that teach, and in whole ones, where more gets lost.

        Raises:
            ValueError: there is no room for so many facts.
        """
        length, pairs = self.causal.length, self.paraphrase.pairs
        return [
            RecallTask(kind=kind, length=tokens, pairs=1 if kind == "passkey" else pairs, vocab_size=WORDS)
            for tokens in (length // 4, length)
            for kind in KINDS
        ]

    def model_size(self) -> dict[str, int]:
        """The fields of `MaBertConfig` that say how large a model is."""
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": max(self.stage_lengths),
        }

    @property
    def initializer_range(self) -> float:
        """Standard deviation of every model's initial matrices and embeddings."""
        # CHOICE: BERT's 0.02 at its own width, growing as the width shrinks: so the layers' outputs keep their size
        return 0.02 * (768 / self.hidden_size) ** 0.5


def tiny() -> Scale:
    """Minutes on two cores: does everything run, and would a planted difference be found?

    Command: mabert experiment all --scale tiny
    """
    return Scale(
        name="tiny",
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=4_096,
        steps=150,
        batch_size=16,
        micro_batch_size=16,
        stage_lengths=(64, 128),
        learning_rate=3e-3,
        warmup_fraction=0.1,
        bf16=False,
        eval_rows=128,
        text_lines=10_000,
        budgets=(0.1, 1.0),
        patterns=("MMMMMMMMMMMM", "TTTTTTTTTTTT", "MMTMMTMMTMMT"),
        pattern_budget=1.0,
        tasks=("CoLA", "RTE"),
        max_train_rows=1_000,
        max_length=64,
        finetuning_seeds=2,
        learning_rates=(1e-3,),
        batch_sizes=(32,),
        epochs=(2,),
        efficiency_scale="tiny",
        efficiency_lengths=(128, 512),
        efficiency_training_lengths=(128, 512),
        cell_seconds=2.0,
        repetitions=5,
        drift_rows=128,
        causal=CausalScale(
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            layers=8,
            length=128,
            steps=150,
            batch_size=8,
            micro_batch_size=8,
            learning_rate=5e-3,
            eval_rows=32,
            schedules=("V1", "V9"),
            timed="tiny",
            timed_lengths=(128, 256),
            timed_points=3,
        ),
        recall=RecallScale(
            hidden_size=32,
            vocab_size=64,
            lengths=(64,),
            beyond=(96,),
            pairs=(4,),
            lessons=(2, 0),
            lesson_steps=(40, 40),
            lesson_tokens=512,
            copied=24,
            steps=40,
            tokens=768,
            seeds=1,
            eval_rows=64,
        ),
        paraphrase=ParaphraseScale(
            models=("sequential",),
            ratios=(0.25,),
            orders=("passage-first",),
            steps=20,
            seeds=1,
            eval_rows=32,
            pairs=2,
            taught=20,
            taught_tokens=512,
            taught_learning_rate=2e-3,
        ),
    )


def cpu() -> Scale:
    """Hours on two cores, on real text: the largest that needs no GPU.

    Command: mabert experiment all --scale cpu --data DATA --jobs 2
    """
    return Scale(
        name="cpu",
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=512,
        vocab_size=16_000,
        steps=1_500,
        batch_size=32,
        micro_batch_size=32,
        # CHOICE: a small model takes a larger step, but BERT, whose norms stand behind its branches, none of 3e-3
        learning_rate=2e-3,
        warmup_fraction=0.1,
        eval_rows=512,
        text_lines=100_000,
        budgets=(0.1, 1.0),
        patterns=("MMMMMMMMMMMM", "TTTTTTTTTTTT", "MMTMMTMMTMMT"),
        pattern_budget=1.0,
        tasks=("CoLA", "SST-2", "MRPC", "RTE"),
        max_train_rows=5_000,
        learning_rates=(3e-4, 1e-3),
        batch_sizes=(32,),
        epochs=(2,),
        efficiency_training_lengths=(128, 512, 1024, 2048),
        repetitions=5,
        drift_rows=256,
        causal=CausalScale(
            hidden_size=128,
            num_attention_heads=4,
            intermediate_size=512,
            layers=8,
            length=1024,
            steps=600,
            batch_size=8,
            micro_batch_size=8,
            learning_rate=2e-3,
            timed="mini",
        ),
        recall=RecallScale(
            intermediate_size=128,
            state_size=4,
            vocab_size=128,
            kinds=("mqar",),
            lengths=(128, 256, 512, 1024),
            beyond=(2048,),
            pairs=(4, 28),
            lessons=(0, 2, 4, 8, 16, 28),
            lesson_steps=(900, 200, 200, 200, 200, 200),
            copied=24,
            steps=500,
            tokens=2_048,
            learning_rate=1e-3,
            eval_rows=32,
        ),
        paraphrase=ParaphraseScale(
            models=("sequential",),
            ratios=(0.25,),
            orders=("passage-first",),
            steps=100,
            eval_rows=64,
            taught=300,
            taught_tokens=1_024,
            taught_learning_rate=1e-3,
        ),
    )


def mini() -> Scale:
    """Days on one GPU, an estimate; in parts.

    Command: mabert experiment all --scale mini --data DATA
    """
    return Scale(
        name="mini",
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=1024,
        steps=2_000,
        batch_size=128,
        micro_batch_size=128,
        learning_rate=2e-3,
        pattern_budget=1.0,
        max_train_rows=10_000,
        learning_rates=(1e-4, 3e-4),
        batch_sizes=(32,),
        epochs=(2,),
        causal=CausalScale(
            hidden_size=256,
            num_attention_heads=4,
            intermediate_size=1024,
            layers=8,
            length=2048,
            steps=1_000,
            batch_size=32,
            micro_batch_size=32,
            learning_rate=2e-3,
        ),
    )


def small() -> Scale:
    """Days on one GPU.

    Command: mabert experiment all --scale small --data DATA
    """
    return Scale(
        name="small",
        hidden_size=512,
        num_attention_heads=8,
        intermediate_size=2048,
        steps=100_000,
        batch_size=128,
        micro_batch_size=64,
        learning_rate=1e-3,
        learning_rates=(3e-5, 1e-4),
        epochs=(3,),
        causal=CausalScale(
            hidden_size=512,
            num_attention_heads=8,
            intermediate_size=2048,
            layers=16,
            length=4096,
            steps=10_000,
            batch_size=64,
            micro_batch_size=16,
            learning_rate=1e-3,
        ),
    )


def base() -> Scale:
    """The paper's.

    Command: mabert experiment all --scale base --data DATA
    """
    return Scale(name="base", match_parameters=False)


SCALES = {scale.__name__: scale for scale in (tiny, cpu, mini, small, base)}


def mabert_config(scale: Scale, **choices: Any) -> MaBertConfig:
    """A MaBERT of a scale's size."""
    size: dict[str, Any] = {**scale.model_size(), "initializer_range": scale.initializer_range}
    return MaBertConfig(**size | choices)
