"""What pretraining and fine-tuning have in common: a run that logs every step, can be stopped and goes on."""

import logging
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import CONFIG_NAME

from mabert.files import atomic_folder, lock, remove_leftovers
from mabert.training.callbacks import (
    AGAINST_DIVERGENCE,
    JsonLines,
    StepLog,
    StopOnSignal,
    TrainingInterruptedError,
    TrainingProgress,
)
from mabert.training.checkpoints import AtomicCheckpointTrainer, list_checkpoints
from mabert.training.run_config import RunConfig

logger = logging.getLogger(__name__)

LOCK = ".lock"


class RunTrainer(AtomicCheckpointTrainer):
    """A Trainer that takes `steps` steps from `first_step` on, logs each of them, and stops on a signal without loss.

    A subclass reports the batches to `step_log` from its `get_batch_samples`. `logs` are the run's files, the one of
    the steps first; in all processes but the first one there are none.
    """

    model: PreTrainedModel

    def __init__(
        self,
        *,
        steps: int,
        first_step: int,
        seed: int,
        logs: Sequence[JsonLines],
        progress: TrainingProgress,
        model: PreTrainedModel,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.steps, self.first_step, self.seed, self.logs, self.progress = steps, first_step, seed, logs, progress
        self.step_log, self.stop = StepLog(logs[0] if logs else None, progress), StopOnSignal()
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, callbacks=[self.step_log, self.stop, *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        # the Trainer sets it, and it would be saved: to an encoder it means nothing, a causal model wants its own back
        if use_cache is None:
            del model.config.use_cache
        else:
            model.config.use_cache = use_cache

    def run(self, checkpoint: Path | None) -> None:
        """Train to the last step, from `checkpoint` on.

        Raises:
            TrainingInterruptedError: a signal asked for it; everything up to there is saved.
        """
        if self.first_step == self.steps:  # only what follows the training is missing
            self._load_from_checkpoint(str(checkpoint))
            return
        # Each process needs dropout of its own; a resume puts back what the checkpoint holds.
        set_seed(self.seed + self.args.process_index)
        with self.stop, self.progress:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.stop.received and (step := self.state.global_step) < self.steps:
            raise TrainingInterruptedError(
                self.stop.received, step, Path(str(self.args.output_dir), f"checkpoint-{step}")
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, forward and backward."""
        loss = super().training_step(*args, **kwargs)
        self.step_log.add_loss(loss)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A finite loss can have an infinite gradient; a resume from what it made of the weights would never recover.
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            raise FloatingPointError(
                f"the weights became NaN or infinite by step {self.state.global_step}. {AGAINST_DIVERGENCE}"
            )
        for lines in self.logs:
            lines.sync()  # a resume relies on every line up to the checkpoint's step
        super()._save_checkpoint(model, trial)


@contextmanager
def claimed(config: RunConfig) -> Iterator[None]:
    """Begin a run in its output folder, or make sure that the one in it is this one; nobody else runs there meanwhile.

    Raises:
        ValueError: the folder holds something else, or a run with other choices.
        BlockingIOError: another process is training there.
    """
    output = config.output
    is_run = (output / config.file_name).exists()
    if not is_run and output.is_dir() and (list_checkpoints(output) or (output / CONFIG_NAME).exists()):
        raise ValueError(f"{output} holds another model or its checkpoints: choose an output folder for this run.")
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if (output / config.file_name).exists():
            config.check_resumes(output)
        remove_leftovers(output)
        config.save(output)
        yield


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    with lock(output / LOCK) as file:
        if file is None:
            pid = (output / LOCK).read_text(encoding="utf-8").strip()
            raise BlockingIOError(
                f"another process (pid {pid}) is training in {output}: wait for it, or choose another output folder"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def training_arguments(
    config: RunConfig, *, steps: int, micro_batch_size: int, accumulation: int, **choices: Any
) -> TrainingArguments:
    """The Trainer's arguments as every run has them, and `choices`."""
    if config.bf16 and not torch.accelerator.is_available() and imitates_bf16():
        logger.warning(
            "this processor (%s) has no instructions for bf16, which torch imitates many times slower than fp32: "
            "bf16=false is faster here",
            processor_name(),
        )
    args = TrainingArguments(
        output_dir=str(config.output),
        seed=config.seed,
        max_steps=steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=not torch.accelerator.is_available(),
        ignore_data_skip=True,  # the sampler begins at the right step
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        disable_tqdm=True,
        **choices,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs without torchrun would become DataParallel
    return args


def publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Leave model and tokenizer in the folder of the run, which from then on is a model folder."""
    staged = output / "model"
    with atomic_folder(staged, replace=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # config.json goes last: from_pretrained(output) finds a whole model or none
    for file in sorted(staged.iterdir(), key=lambda file: file.name == CONFIG_NAME):
        file.replace(output / file.name)
    staged.rmdir()


def environment(args: TrainingArguments) -> dict[str, str]:
    """Hardware and versions that the numbers of a run come from."""
    return {
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else processor_name(),
        "processes": str(args.world_size),
        "threads": str(torch.get_num_threads()),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a number depends on; mabert may run from its source tree without installation."""
    try:
        own = version("mabert")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "python": platform.python_version(),
        "mabert": own,
        **{package: version(package) for package in ("torch", "transformers")},
    }


def imitates_bf16() -> bool:
    """Whether products of matrices in bf16 lack a kernel on this processor."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return known and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def processor_name() -> str:
    """The processor's name, as precise as the system has it."""
    description = Path("/proc/cpuinfo")  # Linux, where platform.processor() has little to say
    text = description.read_text(encoding="utf-8") if description.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()
