"""What a fine-tuning run will do and cost, worked out before it begins."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from mabert.inference.loading import load_config, load_matching_tokenizer, longest_sequence
from mabert.training.batches import StagedBatchSampler, WorldLayout
from mabert.training.estimate import Estimate, measure
from mabert.training.finetune_config import FinetuneConfig
from mabert.training.finetune_data import FinetuneData, load_data
from mabert.training.optim import Schedule, plan_schedule


@dataclass(frozen=True)
class FinetunePlan:
    """A run worked out before it begins; what `mabert finetune --dry-run` shows."""

    config: FinetuneConfig
    model: PreTrainedConfig
    """The model's config, with the task's labels and the settings that the run replaces."""
    parameters: int
    tokenizer: PreTrainedTokenizerFast
    data: FinetuneData
    schedule: Schedule

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.tokens_from(0)

    def tokens_from(self, step: int) -> int:
        """Tokens that are left after `step` steps."""
        return sum(self._tokens_by_step[step:])

    def tokens_of(self, step: int) -> int:
        """Tokens in the batch of a step."""
        return self._tokens_by_step[step]

    @cached_property
    def _tokens_by_step(self) -> list[int]:
        lengths = [len(feature["input_ids"]) for feature in self.data.train.features]
        sampler = self.sampler()  # one for all steps: each keeps the order of its epoch
        return [
            sum(lengths[index] for keys in sampler.micro_batches(step) for *_, index in keys)
            for step in range(self.schedule.steps)
        ]

    @cached_property
    def collate(self) -> DataCollatorWithPadding:
        """Makes a batch of rows, padded to the longest one or to `max_length`."""
        if self.config.pad_to_max_length:
            return DataCollatorWithPadding(self.tokenizer, padding="max_length", max_length=self.config.max_length)
        return DataCollatorWithPadding(self.tokenizer)

    def sampler(self, first_step: int = 0) -> StagedBatchSampler:
        """The micro-batches from a step on; the batch in which an epoch ends is filled from the next one."""
        layout = WorldLayout(self.config.batch_size, self.config.forward_size)
        rows = [len(self.data.train)]
        return StagedBatchSampler(self.schedule, rows, layout, seed=self.config.seed, first_step=first_step)

    def epoch_at(self, step: int) -> int:
        """The epoch, from 0, in which the batch of a step begins."""
        return step * self.config.batch_size // len(self.data.train)


def plan_finetune(config: FinetuneConfig) -> FinetunePlan:
    """Work out what `finetune(config)` will do: read and tokenise the data, and check all choices against each other.

    Raises:
        ValueError: the model folder or a file cannot be used, or the choices do not fit them.
    """
    model = load_config(config.model, **dict(config.overrides))
    tokenizer = load_matching_tokenizer(config.model, model)
    data = load_data(config, tokenizer, longest_sequence(model, tokenizer, config.max_length))
    model.id2label = dict(enumerate(data.label_names))
    model.label2id = {label: index for index, label in model.id2label.items()}
    model.problem_type = "regression" if config.regression else "single_label_classification"
    with torch.device("meta"):
        parameters = AutoModelForSequenceClassification.from_config(model).num_parameters()
    return FinetunePlan(
        config=config,
        model=model,
        parameters=parameters,
        tokenizer=tokenizer,
        data=data,
        schedule=plan_schedule(
            math.ceil(config.epochs * len(data.train) / config.batch_size),
            stage_fractions=(1.0,),
            warmup_fraction=config.warmup_fraction,
        ),
    )


def estimate_finetune(plan: FinetunePlan) -> Estimate:
    """Measure one forward and backward pass of the first micro-batch (for the time) and of the longest rows (for the
    memory), and one optimizer step."""
    rows, size = range(len(plan.data.train)), plan.config.forward_size
    longest = sorted(rows, key=lambda row: -len(plan.data.train.features[row]["input_ids"]))[:size]
    first = [index for _, _, index in plan.sampler().micro_batches(0)[0]]
    return measure(
        AutoModelForSequenceClassification.from_config(plan.model),
        [dict(plan.collate([plan.data.train[0, 0, row] for row in rows])) for rows in (first, longest)],
        steps=(plan.schedule.steps, 0),
        accumulation=plan.config.batch_size // size,
        bf16=plan.config.bf16,
    )
