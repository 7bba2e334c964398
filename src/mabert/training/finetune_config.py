"""Every choice of a fine-tuning run, in one frozen object that is saved beside its results."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from mabert.config import CHOICES
from mabert.data.glue import glue_paths, glue_task
from mabert.training.run_config import RunConfig, model_files

Selection = Literal["last", "best"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run on a GLUE task, or on tables of one's own.

    Raises:
        ValueError: a value is out of range or two of them contradict each other; the message names the field.
    """

    file_name = "finetune_config.json"
    may_change_on_resume = frozenset(("output", "micro_batch_size", "checkpoint_every", "log_every", "workers"))

    model: Path
    """Model folder to start from, of any encoder that transformers' Auto classes know."""
    output: Path
    """Folder of the run, and in the end of its model. A run that was stopped goes on from here."""

    task: str | None = None
    """A GLUE task, read from the folder `glue`."""
    glue: Path | None = None
    """Folder in the official GLUE layout."""
    train: Path | None = None
    """Instead of a task: table to train on, `.tsv .csv .jsonl .parquet`."""
    dev: Path | None = None
    """Table to evaluate on; without it, `dev_fraction` of the rows of `train` are held out."""
    dev_fraction: float = 0.1
    test: Path | None = None
    """Table to evaluate on as well."""
    dev_from_train: bool = False
    """Hold `dev_fraction` of train out as dev and read nothing else, no given dev or test, no official one: for choices
    that a score decides."""
    text_column: str = "text"
    text_pair_column: str | None = None
    """Column of the second text, where a row is a pair."""
    label_column: str = "label"
    regression: bool = False
    """The label is a number to predict, not a class."""
    max_train_rows: int | None = None
    """Train on that many rows only; fewer rows are always among more."""

    # CHOICE: the paper is silent on fine-tuning: BERT's GLUE length, grid, warm-up and decay
    max_length: int = 128
    """Tokens of the longest sequence; what is longer is cut, of a pair the longer text first."""
    pad_to_max_length: bool = False
    """Pad every batch to `max_length`, in the evaluation too, and not only to its longest sequence."""
    epochs: int = 3
    batch_size: int = 32
    micro_batch_size: int | None = None
    """Sequences in one forward pass, the rest of the batch is accumulated; default: the whole batch."""
    learning_rate: float = 2e-5
    """Peak; it rises linearly for `warmup_fraction` of the steps, then falls to zero."""
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 does not clip."""
    seed: int = 0
    """Of the new head, the order of the rows and dropout; which rows are held out does not depend on it."""
    bf16: bool = False
    """Autocast to bfloat16 over fp32 weights while training; dev and test are evaluated in fp32."""

    execution: Literal["packed", "padded"] | None = None
    """Replaces the model's own setting, as do `psm` and `pooling`."""
    psm: Literal["none", "pre", "post", "pre+post", "exact"] | None = None
    pooling: Literal["map", "attention", "cls", "mean"] | None = None

    select: Selection = "last"
    """Which epoch's weights to keep: the last one's, or those best on `select_fraction` of the rows of train, which are
    held out for it. dev is never looked at before the end."""
    select_fraction: float = 0.1
    checkpoint_every: int = 1000
    """Steps between two checkpoints to go on from; they are removed at the end."""
    log_every: int = 50
    """Steps between two lines of progress, where there is no terminal."""
    workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        for name in ("model", "output", "glue", "train", "dev", "test"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))
        self._check_ranges()
        self._check_agreement()

    def _check_ranges(self) -> None:
        counts = "epochs batch_size checkpoint_every log_every"
        requirements = [
            *((name, getattr(self, name) >= 1, "at least 1") for name in counts.split()),
            ("max_length", self.max_length >= 4, "at least 4"),
            ("max_train_rows", self.max_train_rows is None or self.max_train_rows >= 1, "at least 1"),
            ("dev_fraction", 0 < self.dev_fraction < 1, "between 0 and 1"),
            ("select_fraction", 0 < self.select_fraction < 1, "between 0 and 1"),
            ("select", self.select in get_args(Selection), f"one of {', '.join(get_args(Selection))}"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
            ("seed", self.seed >= 0, "at least 0"),
            ("workers", self.workers >= 0, "at least 0"),
            *((name, value in CHOICES[name], f"one of {', '.join(CHOICES[name])}") for name, value in self.overrides),
        ]
        for name, holds, requirement in requirements:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {requirement}.")

    def _check_agreement(self) -> None:
        if (self.task is None) == (self.train is None):
            raise ValueError("Give either a GLUE task (task and glue) or a table to train on (train).")
        if self.task is not None:
            object.__setattr__(self, "task", glue_task(self.task).name)
            if self.glue is None:
                raise ValueError(f"task={self.task!r} needs glue, the folder that holds the GLUE tasks.")
            for name in ("dev", "test", "text_column", "text_pair_column", "label_column", "regression"):
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(f"{name} belongs to a table of your own (train), not to a task: leave it out.")
        elif self.glue is not None:
            raise ValueError("glue is given without a task: name the task, or leave glue out.")
        if self.dev_fraction != _DEFAULTS["dev_fraction"] and not self.holds_dev_out:
            dev = "the task has a dev set" if self.task is not None else f"dev={str(self.dev)!r} is given"
            raise ValueError(
                f"dev_fraction={self.dev_fraction} would hold rows of train out as dev, but {dev}: leave dev_fraction "
                "out, or set dev_from_train=true."
            )
        if self.select_fraction != _DEFAULTS["select_fraction"] and self.select != "best":
            raise ValueError(
                f"select_fraction={self.select_fraction} is of rows to select the best epoch by, but "
                f"select={self.select!r}: leave it out, or set select=best."
            )
        if self.batch_size % self.forward_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}.")

    @property
    def forward_size(self) -> int:
        """Sequences in one forward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def holds_dev_out(self) -> bool:
        """Whether dev is a part of train."""
        return self.dev_from_train or (self.task is None and self.dev is None)

    @property
    def tables(self) -> dict[str, Path]:
        """The files that are read, by the names of their splits; train first."""
        if self.task is not None and self.glue is not None:
            paths = glue_paths(self.glue, self.task)
        else:
            paths = {name: path for name in ("train", "dev", "test") if (path := getattr(self, name)) is not None}
        return {name: path for name, path in paths.items() if name == "train" or not self.dev_from_train}

    @property
    def reads(self) -> tuple[Path, ...]:
        """The model to start from, and the data."""
        return (*model_files(self.model), *self.tables.values())

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """The settings of the model that are replaced, with their new values."""
        given = ((name, getattr(self, name)) for name in ("execution", "psm", "pooling"))
        return tuple((name, value) for name, value in given if value is not None)


_DEFAULTS = {field.name: field.default for field in fields(FinetuneConfig)}
