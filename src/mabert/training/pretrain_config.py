"""Every choice of a pretraining run, in one frozen object that is saved beside its results."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig

from mabert.config import MaBertConfig
from mabert.data.rows import MIN_LENGTH, Packing
from mabert.training.batches import WorldLayout
from mabert.training.objectives import objective_of, takes_seq_idx
from mabert.training.optim import BUDGET_MODES
from mabert.training.run_config import RunConfig, model_files

FROM_TOKENIZER = ("vocab_size", "pad_token_id")
LR_SCHEDULES = ("linear", "cosine")

_PATHS = ("tokenizer", "output", "shards", "init_from")
_SOURCES = ("train", "valid")
_TUPLES = ("stage_lengths", "stage_fractions", "betas")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A pretraining run. The defaults are the paper's, with our choices where it is silent.

    Paths may be given as strings, one source without a tuple around it, `model` as a mapping of its fields.

    Raises:
        ValueError: a value is out of range or two of them contradict each other; the message names the field.
    """

    file_name = "pretrain_config.json"
    may_change_on_resume = frozenset(
        [
            "output",
            "shards",
            "micro_batch_size",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "workers",
            "tensorboard",
        ]
    )

    train: tuple[str, ...]
    """Text to train on: files, folders, globs, `hf://` names."""
    tokenizer: Path
    """Folder of the tokenizer. The vocabulary's size comes from it."""
    output: Path
    """Folder of the run: checkpoints, logs and in the end the model. A run that was stopped goes on from here."""
    valid: tuple[str, ...] = ()
    """Held-out text; where it is empty, `valid_fraction` of the training documents are held out."""
    valid_fraction: float = 0.01
    text_column: str = "text"
    """Column that holds the text in `.jsonl` and `.parquet` files."""
    shards: Path | None = None
    """Folder for the tokenised text, which runs can share; default: `shards` in `output`."""

    model: PreTrainedConfig | Mapping[str, Any] | None = None
    """The architecture; default: `MaBertConfig.base()`, or that of `init_from`. A mapping is one of MaBERT's, unless
    its `model_type` names another language model of transformers. Masked ones learn to fill in masked tokens, causal
    ones (TransMamba and hybrids among them) to predict the next."""
    init_from: Path | None = None
    """Pretrained folder to start from; default: random weights."""
    seed: int = 0

    steps: int = 1_000_000
    """Optimizer steps of a full run."""
    budget: float = 1.0
    """Share of `steps` to spend; the paper's are 0.1, 0.25, 0.5 and 1."""
    budget_mode: str = "own"
    """`"own"`: the budget has its own stages, warm-up and decay; `"truncate"`: the full run stopped early."""
    batch_size: int = 256
    """Sequences in one optimizer step, over all processes."""
    micro_batch_size: int = 32
    """Sequences in one forward pass of one process; the rest of the batch is accumulated."""
    stage_lengths: tuple[int, ...] = (128, 512)
    """Tokens in a row, stage by stage."""
    stage_fractions: tuple[float, ...] = (0.9, 0.1)
    """Share of the steps of each stage."""
    packing: Packing = "documents"
    mlm_probability: float = 0.15
    """Share of the tokens that a masked language model has to predict; a causal one predicts all."""

    learning_rate: float = 6e-4
    warmup_fraction: float = 0.024
    lr_schedule: str = "linear"
    """Decay after the warm-up: `"linear"` to zero, or `"cosine"` to `min_lr_fraction` of the peak."""
    min_lr_fraction: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    # CHOICE: RoBERTa does not clip; at 1.0 a Mamba layer's rare large gradients cost one step and not the run
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 does not clip."""
    bf16: bool = True
    """Autocast to bfloat16 over fp32 weights."""

    eval_every: int = 5_000
    """Steps between two held-out evaluations, at the first stage's length."""
    eval_rows: int = 2_048
    """Held-out rows of the first stage's length to evaluate; longer rows in proportion to their tokens."""
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 2
    log_every: int = 50
    """Steps between two lines of progress (without a terminal) and two points in tensorboard."""
    workers: int = 2
    """Processes that prepare batches ahead; 0 prepares them between the steps."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in _PATHS:
            if (value := getattr(self, name)) is not None:
                self._set(name, Path(value))
        for name in _SOURCES:
            value = getattr(self, name)
            self._set(name, tuple(map(str, [value] if isinstance(value, str | Path) else value)))
        for name in _TUPLES:
            self._set(name, tuple(getattr(self, name)))
        if isinstance(self.model, Mapping):
            if given := [name for name in FROM_TOKENIZER if name in self.model]:
                raise ValueError(f"model.{given[0]} comes from the tokenizer: leave it out.")
            fields = {"model_type": MaBertConfig.model_type} | dict(self.model)
            self._set("model", AutoConfig.for_model(fields.pop("model_type"), **fields))
        elif self.model is None and self.init_from is None:
            self._set("model", MaBertConfig.base())
        self._check_ranges()
        self._check_agreement()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        counts = "steps batch_size micro_batch_size eval_every eval_rows checkpoint_every keep_checkpoints log_every"
        requirements = [
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts.split()),
            ("train", bool(self.train), "one or more sources"),
            ("valid_fraction", 0 < self.valid_fraction < 1, "between 0 and 1"),
            ("seed", self.seed >= 0, "at least 0"),
            ("budget", 0 < self.budget <= 1, "above 0 and at most 1"),
            ("budget_mode", self.budget_mode in BUDGET_MODES, f"one of {', '.join(BUDGET_MODES)}"),
            (
                "stage_lengths",
                all(length >= MIN_LENGTH for length in self.stage_lengths),
                f"lengths of at least {MIN_LENGTH} tokens",
            ),
            ("packing", self.packing in get_args(Packing), f"one of {', '.join(get_args(Packing))}"),
            ("mlm_probability", 0 < self.mlm_probability < 1, "between 0 and 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "at least 0 and below 1"),
            ("lr_schedule", self.lr_schedule in LR_SCHEDULES, f"one of {', '.join(LR_SCHEDULES)}"),
            ("min_lr_fraction", 0 <= self.min_lr_fraction < 1, "at least 0 and below 1"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
            ("workers", self.workers >= 0, "at least 0"),
        ]
        for name, holds, requirement in requirements:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {requirement}.")

    def _check_agreement(self) -> None:
        if self.model is not None and self.init_from is not None:
            raise ValueError("model and init_from exclude each other: init_from brings its own architecture.")
        shares = self.stage_fractions
        if len(shares) != len(self.stage_lengths) or min(shares, default=0) <= 0 or not math.isclose(sum(shares), 1):
            raise ValueError(
                f"stage_fractions={shares} must give each of stage_lengths={self.stage_lengths} its share of the "
                "steps: as many numbers above 0, which add up to 1."
            )
        if self.min_lr_fraction and self.lr_schedule != "cosine":
            raise ValueError(
                f"min_lr_fraction={self.min_lr_fraction} has no effect on lr_schedule={self.lr_schedule!r}, which ends "
                "at zero: take lr_schedule='cosine' beside it."
            )
        WorldLayout(self.batch_size, self.micro_batch_size)
        if isinstance(self.model, PreTrainedConfig):
            check_trainable(self.model, self)

    @property
    def reads(self) -> tuple[Path, ...]:
        """The model to start from; tokenised text is compared with its sources by its own manifest."""
        return model_files(self.init_from) if self.init_from else ()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; of the model, what differs from the default and is not the tokenizer's."""
        values = super().to_dict()
        if isinstance(self.model, PreTrainedConfig):
            left_out = {"transformers_version", *FROM_TOKENIZER}
            model = {k: v for k, v in self.model.to_diff_dict().items() if k not in left_out}
            values["model"] = json.loads(json.dumps(model, default=str))
        return values


def check_trainable(model: PreTrainedConfig, config: PretrainConfig) -> None:
    """Raise ValueError if a model of this architecture cannot be pretrained on the rows of `config`."""
    objective = objective_of(model)
    if not objective.is_masked and config.mlm_probability != PretrainConfig.mlm_probability:
        raise ValueError(f"mlm_probability says nothing to a causal {model.model_type} model: leave it out.")
    if isinstance(model, MaBertConfig) and model.execution != "packed":
        raise ValueError(
            f"model.execution={model.execution!r} cannot pretrain: rows hold several documents and no pads, so psm has "
            "nothing to act on. Pretrain with execution='packed' and choose it when fine-tuning."
        )
    if config.packing != "full-sentences" and not takes_seq_idx(model):
        raise ValueError(
            f"packing={config.packing!r} puts several sequences in a row, which a {model.model_type} model would mix. "
            "Take packing='full-sentences', where a row is one sequence."
        )
    longest = getattr(model, "max_position_embeddings", None)  # recurrent models have no limit
    if longest is not None and max(config.stage_lengths) > longest:
        raise ValueError(
            f"stage_lengths={config.stage_lengths} exceed max_position_embeddings={model.max_position_embeddings}: "
            "raise model.max_position_embeddings or shorten the rows."
        )
