"""Fine-tuning of an encoder on classification or regression, of single texts or pairs."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from mabert.files import atomic_write
from mabert.inference.loading import load_config, load_model
from mabert.training.batches import train_loader
from mabert.training.callbacks import JsonLines, TrainingProgress, read_lines, say, without_progress_bars
from mabert.training.checkpoints import checkpoint_step, latest_complete_checkpoint, list_checkpoints
from mabert.training.finetune_config import FinetuneConfig
from mabert.training.finetune_plan import FinetunePlan, estimate_finetune, plan_finetune
from mabert.training.finetune_scores import BEST, BestEpoch, SplitResult, score, split_logits, write_predictions
from mabert.training.optim import adamw
from mabert.training.runs import RunTrainer, claimed, environment, publish, training_arguments

__all__ = ["FinetuneConfig", "FinetunePlan", "FinetuneResult", "estimate_finetune", "finetune", "plan_finetune"]

STEP_LOG, SELECTION_LOG, METRICS = "log.jsonl", "selection.jsonl", "metrics.json"
# CHOICE: BERT's Adam, as every published fine-tuning of it
BETAS, EPS = (0.9, 0.999), 1e-6


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run reached; `metrics.json` in its folder."""

    output: Path
    """Folder of the model: `AutoModelForSequenceClassification.from_pretrained(output)`."""
    splits: dict[str, SplitResult]
    """The scores by set: dev (for MNLI dev_matched and dev_mismatched), and test where one was given."""
    train_rows: int
    train_subset: str
    train_truncated: int
    steps: int
    selection: dict[str, float] | None
    """With `select="best"`: the epoch, from 1, whose weights were kept, and its scores on the rows that selected it."""
    seconds: float
    """Time in training steps, over all parts of a resumed run."""
    parameters: int
    environment: dict[str, str]
    """Hardware and versions that the numbers come from."""
    config: dict[str, Any]
    """Every choice of the run."""

    def summary(self) -> list[str]:
        """A line for each set."""
        return [
            f"{' '.join(filter(None, (self.config['task'], name, split.subset)))}: {split}"
            for name, split in self.splits.items()
        ]


def finetune(config: FinetuneConfig, *, console: Console | None = None) -> FinetuneResult:
    """Fine-tune a model folder and leave the model, its tokenizer, scores and predictions in `config.output`.

    Besides the model, the folder then holds `metrics.json` (the result), `predictions-<set>.tsv`, `log.jsonl` (every
    step) and `finetune_config.json`. A run that was stopped goes on from its newest complete checkpoint when it is
    started again with the same choices; a finished one gives its result at once.

    Raises:
        ValueError: the model folder or a file cannot be used, or the choices do not fit them or an earlier run.
        BlockingIOError: another process is training in `config.output`.
        TrainingInterruptedError: Ctrl-C or SIGTERM; a checkpoint was saved first.
        FloatingPointError: the loss became NaN or infinite.
    """
    console = console or Console(stderr=True)
    if (config.output / METRICS).exists():
        config.check_resumes(config.output)
        say(console, f"{config.output} is finished already.")
        return read_result(config.output)
    planned = plan_finetune(config)
    with claimed(config), without_progress_bars():
        return _run(planned, console)


def read_result(output: Path) -> FinetuneResult:
    """The result of a finished run."""
    values = json.loads((output / METRICS).read_text(encoding="utf-8"))
    values["splits"] = {name: SplitResult(**split) for name, split in values["splits"].items()}
    return FinetuneResult(output=output, **values)


def _run(planned: FinetunePlan, console: Console) -> FinetuneResult:
    config, data = planned.config, planned.data
    args = _training_arguments(planned)
    checkpoint, skipped = latest_complete_checkpoint(config.output)
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    lines = [*skipped, f"going on from {checkpoint}"] if checkpoint else skipped
    for name, split in {"train": data.train, **data.evaluation}.items():
        if split.truncated:
            lines.append(f"{name}: {split.truncated:,} of {len(split):,} rows are cut to {config.max_length} tokens")
    for line in lines:
        say(console, line)

    set_seed(config.seed)
    model = _load_classifier(planned)
    with ExitStack() as stack:
        names = (STEP_LOG, SELECTION_LOG) if data.selection else (STEP_LOG,)
        trainer = FinetuneTrainer(
            planned,
            first_step=first_step,
            logs=[stack.enter_context(JsonLines(config.output / name, last_step=first_step)) for name in names],
            progress=TrainingProgress(
                console,
                first_step=first_step,
                steps=planned.schedule.steps,
                tokens_left=planned.tokens_from(first_step),
                every=config.log_every,
                part="epoch",
            ),
            model=model,
            args=args,
        )
        trainer.run(checkpoint)
    # accelerate's autocast would stay on the model, which is used in fp32 from here on
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    selection = trainer.best.restore(model) if trainer.best else None

    splits = {}
    for name, split in data.evaluation.items():
        logits = split_logits(model, planned, split, name, console)
        splits[name] = score(split, logits, data)
        write_predictions(config.output / f"predictions-{name}.tsv", split, logits, data)
    publish(model, planned.tokenizer, config.output)
    _write_result(planned, args, splits, selection)
    for leftover in [*list_checkpoints(config.output), *config.output.glob(BEST)]:
        shutil.rmtree(leftover)
    result = read_result(config.output)
    for line in result.summary():
        say(console, line)
    return result


class FinetuneTrainer(RunTrainer):
    """The Trainer of `finetune`: its own batches, loss, optimizer and schedule."""

    model: PreTrainedModel

    def __init__(self, planned: FinetunePlan, *, logs: Sequence[JsonLines], model: PreTrainedModel, **kwargs: Any):
        self.plan = planned
        self.best = BestEpoch(planned, logs[1], kwargs["progress"]) if planned.data.selection else None
        super().__init__(
            steps=planned.schedule.steps,
            seed=planned.config.seed,
            logs=logs,
            model=model,
            callbacks=[self.best] if self.best else [],
            processing_class=planned.tokenizer,
            train_dataset=planned.data.train,
            compute_loss_func=_loss,
            **kwargs,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam over our parameter groups."""
        if self.optimizer is None:
            rate, decay = self.plan.config.learning_rate, self.plan.config.weight_decay
            self.optimizer = adamw(self.model, learning_rate=rate, betas=BETAS, eps=EPS, weight_decay=decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, linear decay to zero."""
        schedule = self.plan.schedule
        self.lr_scheduler = get_linear_schedule_with_warmup(self.optimizer, schedule.warmup_steps, schedule.decay_steps)
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches from the step to go on from, each padded."""
        return train_loader(
            self.plan.data.train,
            self.plan.sampler(self.first_step),
            collate=self.plan.collate,
            workers=self.plan.config.workers,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of one optimizer step and their number of rows; timed."""
        step = self.state.global_step
        self.step_log.begin(self.plan.epoch_at(step), tokens=self.plan.tokens_of(step))
        batches = list(islice(epoch_iterator, num_batches))
        self.step_log.data_arrived()
        return batches, sum(len(batch["labels"]) for batch in batches)


def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """This micro-batch's share of the batch's mean loss: many of transformers' heads ignore num_items_in_batch."""
    logits = outputs.logits.float()
    if labels.is_floating_point():
        total = torch.nn.functional.mse_loss(logits.squeeze(-1), labels, reduction="sum")
    else:
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / num_items_in_batch


def _training_arguments(planned: FinetunePlan) -> TrainingArguments:
    config = planned.config
    args = training_arguments(
        config,
        steps=planned.schedule.steps,
        micro_batch_size=config.forward_size,
        accumulation=config.batch_size // config.forward_size,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
    )
    if args.world_size > 1:
        raise ValueError(f"fine-tuning runs in one process, not in {args.world_size}: start it without torchrun")
    return args


def _load_classifier(planned: FinetunePlan) -> PreTrainedModel:
    """The model to train. Its head is new, unless the folder's own has the same labels."""
    folder, config = planned.config.model, planned.model
    model = load_model(AutoModelForSequenceClassification, folder, config, new_head=True)
    before = load_config(folder)
    if type(model).__name__ in (before.architectures or ()) and before.id2label != config.id2label:
        # a head of the same shape was loaded, but it knows other labels
        fresh = AutoModelForSequenceClassification.from_config(config)
        for name, module in fresh.named_children():
            if name != model.base_model_prefix:
                model.get_submodule(name).load_state_dict(module.state_dict())
    return model


def _write_result(
    planned: FinetunePlan,
    args: TrainingArguments,
    splits: dict[str, SplitResult],
    selection: dict[str, float] | None,
) -> None:
    config, train = planned.config, planned.data.train
    result = {
        "splits": {name: asdict(split) for name, split in splits.items()},
        "train_rows": len(train),
        "train_subset": train.subset,
        "train_truncated": train.truncated,
        "steps": planned.schedule.steps,
        "selection": selection,
        "seconds": sum(record["seconds"] for record in read_lines(config.output / STEP_LOG)),
        "parameters": planned.parameters,
        "environment": environment(args),
        "config": config.to_dict(),
    }
    with atomic_write(config.output / METRICS, "w") as file:
        json.dump(result, file, indent=2)
        file.write("\n")
