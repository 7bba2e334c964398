"""What a pretraining run will do, cost and need, worked out before it begins."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from mabert.data.rows import Rows
from mabert.data.shards import MANIFEST, Progress, Shards, prepare_shards
from mabert.data.tokenizer import load_tokenizer
from mabert.inference.loading import load_config
from mabert.training.batches import WorldLayout
from mabert.training.estimate import Estimate, measure
from mabert.training.objectives import objective_of, takes_seq_idx
from mabert.training.optim import Schedule, plan_schedule
from mabert.training.pretrain_config import PretrainConfig, check_trainable

# CHOICE: the split does not depend on the run's seed, so that runs with other seeds are measured on the same documents
SPLIT_SEED = 0
MEASURED_SEQUENCES = 2


@dataclass(frozen=True)
class PretrainPlan:
    """A run in numbers; what `mabert pretrain --dry-run` shows."""

    config: PretrainConfig
    model: PreTrainedConfig
    """The architecture, with the tokenizer's vocabulary."""
    parameters: int
    schedule: Schedule
    layout: WorldLayout
    rows: tuple[int, ...] | None
    """Training rows of each stage's length; None before the text is tokenised."""
    held_out_rows: tuple[int, ...] | None

    @property
    def stage_tokens(self) -> tuple[int, ...]:
        """Tokens that each stage trains on."""
        lengths = self.config.stage_lengths
        return tuple(
            steps * self.config.batch_size * length
            for steps, length in zip(self.schedule.stage_steps, lengths, strict=True)
        )

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return sum(self.stage_tokens)

    @property
    def epochs(self) -> tuple[float, ...] | None:
        """How often each stage passes over the training text; None before it is tokenised."""
        if self.rows is None:
            return None
        sequences = (steps * self.config.batch_size for steps in self.schedule.stage_steps)
        return tuple(count / rows for count, rows in zip(sequences, self.rows, strict=True))

    def tokens_from(self, step: int) -> int:
        """Tokens that are left after `step` steps."""
        lengths, ends = self.config.stage_lengths, self.schedule.stage_ends
        begins = (0, *ends[:-1])
        steps_left = (max(0, end - max(begin, step)) for begin, end in zip(begins, ends, strict=True))
        return sum(steps * self.config.batch_size * length for steps, length in zip(steps_left, lengths, strict=True))


def plan(config: PretrainConfig) -> PretrainPlan:
    """Work out what `pretrain(config)` will do, without doing any of it.

    Raises:
        ValueError: the choices do not fit the tokenizer, the text or the number of processes.
    """
    layout = WorldLayout(
        config.batch_size,
        config.micro_batch_size,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
    )
    tokenizer = load_tokenizer(config.tokenizer)
    model = resolve_model(config, tokenizer)
    rows = held_out_rows = None
    if _is_tokenised(config):
        train, held_out = prepare_rows(config, tokenizer)
        rows, held_out_rows = tuple(map(len, train)), tuple(map(len, held_out))
    with torch.device("meta"):
        parameters = objective_of(model).auto_class.from_config(model).num_parameters()
    return PretrainPlan(
        config=config,
        model=model,
        parameters=parameters,
        schedule=plan_schedule(
            config.steps,
            budget=config.budget,
            budget_mode=config.budget_mode,
            stage_fractions=config.stage_fractions,
            warmup_fraction=config.warmup_fraction,
        ),
        layout=layout,
        rows=rows,
        held_out_rows=held_out_rows,
    )


def resolve_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The architecture to train: the given one with the tokenizer's vocabulary, or that of `init_from`."""
    if config.init_from is None:
        assert isinstance(config.model, PreTrainedConfig)
        given = config.model.to_diff_dict()
        from_tokenizer = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if not objective_of(config.model).is_masked:
            ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
            from_tokenizer |= {name: value for name, value in ends.items() if given.get(name) is None}
        return type(config.model)(**given | from_tokenizer)
    model = load_config(config.init_from)
    if model.vocab_size != len(tokenizer):
        raise ValueError(
            f"the model in {config.init_from} has {model.vocab_size:,} tokens, the tokenizer in {config.tokenizer} has "
            f"{len(tokenizer):,}: give the tokenizer that the model was trained with."
        )
    check_trainable(model, config)
    return model


def prepare_rows(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, progress: Progress | None = None
) -> tuple[list[Rows], list[Rows]]:
    """Tokenise the text, or open what an earlier run left, and cut it into training and held-out rows, by stage.

    Raises:
        ValueError: there is too little text for one row.
    """

    def shards(sources: tuple[str, ...], name: str) -> Shards:
        return prepare_shards(
            sources, tokenizer, _shards_folder(config) / name, text_column=config.text_column, progress=progress
        )

    train = shards(config.train, "train")
    if config.valid:
        held_out = shards(config.valid, "valid")
    else:
        train, held_out = train.split(config.valid_fraction, SPLIT_SEED)
    return _cut(train, config, "training"), _cut(held_out, config, "held-out")


def _cut(shards: Shards, config: PretrainConfig, name: str) -> list[Rows]:
    try:
        return [Rows(shards, length, config.packing) for length in config.stage_lengths]
    except ValueError as error:
        raise ValueError(f"the {name} text is too short: {error}") from error


def _shards_folder(config: PretrainConfig) -> Path:
    return config.shards or config.output / "shards"


def _is_tokenised(config: PretrainConfig) -> bool:
    names = ["train", "valid"] if config.valid else ["train"]
    return all((_shards_folder(config) / name / MANIFEST).exists() for name in names)


def estimate(plan: PretrainPlan) -> Estimate:
    """Measure one forward and backward pass of each stage, and one optimizer step, on random tokens.

    A whole micro-batch may need more memory than this machine has; two of its sequences tell what it takes.
    """
    sequences = min(plan.config.micro_batch_size, MEASURED_SEQUENCES)
    return measure(
        objective_of(plan.model).auto_class.from_config(plan.model),
        [_random_batch(plan, sequences, length) for length in plan.config.stage_lengths],
        scale=plan.config.micro_batch_size / sequences,
        steps=plan.schedule.stage_steps,
        accumulation=plan.layout.accumulation,
        bf16=plan.config.bf16,
    )


def _random_batch(plan: PretrainPlan, sequences: int, length: int) -> dict[str, Tensor]:
    shape = (sequences, length)
    ids = torch.randint(plan.model.vocab_size, shape)
    if not objective_of(plan.model).is_masked:
        labels = ids
    else:
        labels = ids.where(torch.rand(shape) < plan.config.mlm_probability, -100)
    known = {"seq_idx": torch.zeros_like(ids)} if takes_seq_idx(plan.model) else {}
    return {"input_ids": ids, "labels": labels} | known
