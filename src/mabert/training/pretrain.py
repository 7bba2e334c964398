"""Pretraining of a language model: one Trainer, one optimizer, one schedule over all stages of row length."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    TrainingArguments,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    set_seed,
)

from mabert.causal_config import TransMambaConfig
from mabert.data.mlm import IGNORED
from mabert.data.rows import Rows
from mabert.data.tokenizer import for_generation, load_tokenizer
from mabert.files import atomic_write
from mabert.inference.loading import load_model
from mabert.training.batches import StagedBatchSampler, train_loader
from mabert.training.callbacks import (
    JsonLines,
    TokenisingProgress,
    TrainingInterruptedError,
    TrainingProgress,
    read_lines,
    say,
    without_progress_bars,
)
from mabert.training.checkpoints import checkpoint_step, latest_complete_checkpoint
from mabert.training.estimate import Estimate
from mabert.training.held_out import HeldOut, evaluate_held_out
from mabert.training.objectives import (
    Objective,
    computes_own_loss,
    head_at,
    loss_at_labels,
    objective_of,
    takes_seq_idx,
)
from mabert.training.optim import adamw
from mabert.training.plan import PretrainPlan, estimate, plan, prepare_rows
from mabert.training.pretrain_config import PretrainConfig
from mabert.training.runs import RunTrainer, claimed, environment, publish, training_arguments

__all__ = [
    "Estimate",
    "PretrainConfig",
    "PretrainPlan",
    "PretrainResult",
    "TrainingInterruptedError",
    "estimate",
    "plan",
    "pretrain",
]

STEP_LOG, EVALUATION_LOG, METRICS = "log.jsonl", "evaluations.jsonl", "metrics.json"
# CHOICE: the held-out masks do not depend on the run's seed, as the held-out documents do not
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run reached; `metrics.json` in its folder."""

    output: Path
    """Folder of the model: `AutoModelForMaskedLM.from_pretrained(output)`, or `AutoModelForCausalLM`."""
    held_out_loss: float
    """At the first stage's length, in nats a predicted token."""
    perplexity: float
    accuracy: float
    """Of the masked or next tokens."""
    unigram_entropy: float
    """Of the held-out rows: the loss that any predictor without context stays above."""
    held_out: tuple[HeldOut, ...]
    """The held-out measurements at every stage's length."""
    steps: int
    tokens: int
    seconds: float
    """Time in training steps, over all parts of a resumed run."""
    tokens_per_second: float
    data_wait: float
    """Share of the training time spent waiting for batches."""
    parameters: int
    environment: dict[str, str]
    """Hardware and versions that the numbers come from."""


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> PretrainResult:
    """Pretrain a masked or causal language model and leave it, with its tokenizer, in `config.output`.

    A run that was stopped goes on from its newest complete checkpoint when it is started again with the same choices;
    a finished one gives its result at once. Works in one process or under `torchrun`.

    Raises:
        ValueError: the choices do not fit the text, the tokenizer or an earlier run in `config.output`.
        BlockingIOError: another process is training in `config.output`.
        TrainingInterruptedError: Ctrl-C or SIGTERM; a checkpoint was saved first.
        FloatingPointError: the loss became NaN or infinite.
    """
    planned = plan(config)
    console = Console(quiet=True) if planned.layout.rank else console or Console(stderr=True)
    claim = nullcontext() if planned.layout.rank else claimed(config)
    with claim, _own_process_group(), without_progress_bars():
        return _run(planned, console)


def _run(planned: PretrainPlan, console: Console) -> PretrainResult:
    config, output = planned.config, planned.config.output
    args = _training_arguments(planned)
    is_first = args.process_index == 0
    tokenizer = load_tokenizer(config.tokenizer)
    with args.main_process_first(local=False):
        is_finished = (output / METRICS).exists()
        if not is_finished:
            with TokenisingProgress(console) as report:
                train_rows, held_out_rows = prepare_rows(config, tokenizer, report)
    if is_finished:
        say(console, f"{output} is finished already.")
        return _read_result(output)

    checkpoint, skipped = latest_complete_checkpoint(output)
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    for line in [*skipped, f"going on from {checkpoint}"] if checkpoint else skipped:
        say(console, line)

    set_seed(config.seed)
    init, objective = config.init_from, objective_of(planned.model)
    model = load_model(objective.auto_class, init) if init else objective.auto_class.from_config(planned.model)

    def samples(rows: list[Rows], seed: int) -> Any:
        return objective.dataset(rows, tokenizer, seed=seed, mlm_probability=config.mlm_probability)

    with ExitStack() as stack:
        names = (STEP_LOG, EVALUATION_LOG) if is_first else ()
        trainer = PretrainTrainer(
            planned,
            first_step=first_step,
            logs=[stack.enter_context(JsonLines(output / name, last_step=first_step)) for name in names],
            progress=TrainingProgress(
                console,
                first_step=first_step,
                steps=planned.schedule.steps,
                tokens_left=planned.tokens_from(first_step),
                every=config.log_every,
            ),
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=samples(train_rows, config.seed),
            eval_dataset=samples(held_out_rows, HELD_OUT_SEED),
        )
        trainer.run(checkpoint)
    if is_first:
        longest = getattr(model.config, "max_position_embeddings", None)
        published = tokenizer if objective.is_masked else for_generation(tokenizer, longest)
        publish(trainer.accelerator.unwrap_model(trainer.model), published, output)
        _write_result(planned, args)
    trainer.accelerator.wait_for_everyone()
    return _read_result(output)


class PretrainTrainer(RunTrainer):
    """The Trainer of `pretrain`: its own batches, optimizer, schedule and held-out evaluation."""

    train_dataset: Any
    eval_dataset: Any
    processing_class: PreTrainedTokenizerBase

    def __init__(self, planned: PretrainPlan, *, logs: Sequence[JsonLines], **kwargs: Any) -> None:
        self.plan, self.evaluations = planned, logs[1] if logs else None
        self.objective: Objective = objective_of(kwargs["model"].config)
        self.model_has_own_loss = computes_own_loss(kwargs["model"])
        self.tells_sequences_apart = takes_seq_idx(kwargs["model"].config)
        if not self.model_has_own_loss:
            kwargs["compute_loss_func"] = loss_at_labels
        super().__init__(steps=planned.schedule.steps, seed=planned.config.seed, logs=logs, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam over our parameter groups."""
        if self.optimizer is None:
            config = self.plan.config
            self.optimizer = adamw(
                self.model,
                learning_rate=config.learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        """Warm-up and decay over the schedule, which a truncated run does not reach the end of."""
        schedule, config = self.plan.schedule, self.plan.config
        assert self.optimizer is not None
        spans = (self.optimizer, schedule.warmup_steps, schedule.decay_steps)
        if config.lr_schedule == "linear":
            self.lr_scheduler = get_linear_schedule_with_warmup(*spans)
        else:
            least = config.min_lr_fraction
            self.lr_scheduler = get_cosine_with_min_lr_schedule_with_warmup(*spans, min_lr_rate=least)
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches from the step to go on from."""
        sampler = StagedBatchSampler(
            self.plan.schedule,
            [len(rows) for rows in self.train_dataset.stages],
            self.plan.layout,
            seed=self.plan.config.seed,
            first_step=self.first_step,
        )
        return train_loader(
            self.train_dataset,
            sampler,
            workers=self.plan.config.workers,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of one optimizer step and their number of labels over all processes; timed."""
        stage = self.plan.schedule.stage_at(self.state.global_step)
        config = self.plan.config
        self.step_log.begin(stage, tokens=config.batch_size * config.stage_lengths[stage])
        batches = list(islice(epoch_iterator, num_batches))
        self.step_log.data_arrived()
        return batches, self._get_num_items_in_batch(batches, device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss at the labelled positions; rows of a model that knows no `seq_idx` are one sequence each."""
        if not self.tells_sequences_apart:
            del inputs["seq_idx"]
        if self.model_has_own_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with head_at(inputs["labels"] != IGNORED, self.accelerator.unwrap_model(model)):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss at the first stage's length, after the last step at every stage's length."""
        config, step = self.plan.config, self.state.global_step
        is_last = step == self.plan.schedule.steps
        metrics: dict[str, float] = {}
        for stage, length in enumerate(config.stage_lengths if is_last else config.stage_lengths[:1]):
            rows = max(1, config.eval_rows * config.stage_lengths[0] // length)
            available = len(self.eval_dataset.stages[stage])
            result = evaluate_held_out(
                self.model,
                self.eval_dataset,
                [(stage, 0, index) for index in range(min(rows, available))],
                batch_size=config.micro_batch_size,
                special_ids=self.processing_class.all_special_ids if self.objective.is_masked else None,
                device=self.args.device,
                rank=self.args.process_index,
                world_size=self.args.world_size,
            )
            if self.evaluations is not None:
                self.evaluations.append({"step": step, **asdict(result)})
            self.progress.note(
                f"held-out at step {step:,}, {length} tokens: loss {result.loss:.4f} (unigram entropy "
                f"{result.unigram_entropy:.4f}), perplexity {result.perplexity:.2f}, accuracy "
                f"{result.accuracy:.4f}"
            )
            metrics |= {f"eval_{length}_{name}": value for name, value in asdict(result).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _training_arguments(planned: PretrainPlan) -> TrainingArguments:
    config = planned.config
    on_cpu = not torch.accelerator.is_available()
    return training_arguments(
        config,
        steps=planned.schedule.steps,
        micro_batch_size=config.micro_batch_size,
        accumulation=planned.layout.accumulation,
        ddp_backend="gloo" if on_cpu and planned.layout.world_size > 1 else None,
        # a TransMamba layer whose TransPoint is behind every row has no use for what only the SSM reads
        ddp_find_unused_parameters=planned.model.model_type == TransMambaConfig.model_type,
        ddp_timeout=24 * 3600,  # the other processes wait while the first one tokenises the text
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_total_limit=config.keep_checkpoints,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if config.tensorboard else [],
    )


@contextmanager
def _own_process_group() -> Iterator[None]:
    """Leave no process group behind that was not there before."""
    was_initialized = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not was_initialized:
            dist.destroy_process_group()


def _write_result(planned: PretrainPlan, args: TrainingArguments) -> None:
    output, steps = planned.config.output, planned.schedule.steps
    records = read_lines(output / STEP_LOG)
    tokens, seconds = (sum(record[name] for record in records) for name in ("tokens", "seconds"))
    waited = sum(record["seconds"] * record["data_wait"] for record in records)
    held_out = [line for line in read_lines(output / EVALUATION_LOG) if line.pop("step") == steps]
    result = {
        "held_out_loss": held_out[0]["loss"],
        **{name: held_out[0][name] for name in ("perplexity", "accuracy", "unigram_entropy")},
        "held_out": held_out,
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait": waited / seconds,
        "parameters": planned.parameters,
        "environment": environment(args),
    }
    with atomic_write(output / METRICS, "w") as file:
        json.dump(result, file, indent=2)
        file.write("\n")


def _read_result(output: Path) -> PretrainResult:
    values = json.loads((output / METRICS).read_text(encoding="utf-8"))
    values["held_out"] = tuple(HeldOut(**line) for line in values["held_out"])
    return PretrainResult(output=output, **values)
