"""What pretraining and fine-tuning have in common: a run that logs every step, can be stopped and goes on."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
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

from mabert.files import atomic_folder
from mabert.training.callbacks import (
    AGAINST_DIVERGENCE,
    JsonLines,
    StepLog,
    StopOnSignal,
    TrainingInterruptedError,
    TrainingProgress,
)
from mabert.training.checkpoints import AtomicCheckpointTrainer


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
        knows_cache = hasattr(model.config, "use_cache")
        super().__init__(model=model, callbacks=[self.step_log, self.stop, *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        if not knows_cache:
            del model.config.use_cache  # the Trainer's; it would be saved, and means nothing to an encoder

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
        "python": platform.python_version(),
        **{package: version(package) for package in ("mabert", "torch", "transformers")},
    }


def processor_name() -> str:
    """The processor's name, as precise as the system has it."""
    description = Path("/proc/cpuinfo")  # Linux, where platform.processor() has little to say
    text = description.read_text(encoding="utf-8") if description.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()
