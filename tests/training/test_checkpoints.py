import errno
import json
import shutil

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, TrainerCallback, TrainingArguments

from mabert.training.checkpoints import (
    AtomicCheckpointTrainer,
    checkpoint_step,
    latest_complete_checkpoint,
    list_checkpoints,
)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(1, 20, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(output, *, callbacks=(), **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    choices = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2, "per_device_train_batch_size": 2}
    return AtomicCheckpointTrainer(
        model=BertForMaskedLM(BertConfig(vocab_size=20, **sizes)),
        args=TrainingArguments(
            output_dir=str(output), use_cpu=True, report_to=[], disable_tqdm=True, **choices | changes
        ),
        train_dataset=Rows(),
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    trainer(output).train()
    return output


@pytest.fixture
def output(finished, tmp_path):
    """A copy of a run with checkpoint-4 and checkpoint-6."""
    return shutil.copytree(finished, tmp_path / "run")


def test_older_checkpoints_are_rotated_and_nothing_temporary_is_left(finished):
    assert [path.name for path in list_checkpoints(finished)] == ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in finished.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_lists_its_files(finished):
    files = json.loads((finished / "checkpoint-6" / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(files)
    for name, size in files.items():
        assert (finished / "checkpoint-6" / name).stat().st_size == size


def test_the_newest_complete_checkpoint_is_found(finished, tmp_path):
    assert latest_complete_checkpoint(finished) == (finished / "checkpoint-6", [])
    assert latest_complete_checkpoint(tmp_path) == (None, [])
    assert latest_complete_checkpoint(tmp_path / "nowhere") == (None, [])


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other"):
        (tmp_path / name).mkdir()
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [9, 10]
    with pytest.raises(ValueError, match="not named checkpoint-<step>"):
        checkpoint_step(tmp_path / "other")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json, so it was not written to its"),
        (lambda folder: truncate(folder / "manifest.json"), "its manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "its manifest.json cannot be read"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (
            lambda folder: truncate(folder / "model.safetensors"),
            r"model.safetensors has [\d,]+ bytes instead of [\d,]+",
        ),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(output, damage, reason):
    damage(output / "checkpoint-6")
    found, skipped = latest_complete_checkpoint(output)
    assert found == output / "checkpoint-4"
    assert len(skipped) == 1
    with pytest.raises(ValueError, match=f"checkpoint-6 skipped: {reason}"):
        raise ValueError(skipped[0])


def test_an_incomplete_checkpoint_is_replaced_when_the_run_gets_there_again(output):
    (output / "checkpoint-6" / "manifest.json").unlink()
    (output / "checkpoint-6" / "stray").touch()
    trainer(output).train(resume_from_checkpoint=str(output / "checkpoint-4"))
    assert latest_complete_checkpoint(output) == (output / "checkpoint-6", [])
    assert not (output / "checkpoint-6" / "stray").exists()


def test_rotation_never_takes_an_incomplete_checkpoint_for_the_newest(output):
    (output / "checkpoint-6" / "manifest.json").unlink()
    resumed = trainer(output, save_total_limit=1, max_steps=5, save_steps=1)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-4"))
    assert latest_complete_checkpoint(output)[0] == output / "checkpoint-5"


def test_a_resume_restores_the_weights_of_tied_models_and_refuses_others(output):
    restored = trainer(output)
    nn.init.zeros_(restored.model.get_input_embeddings().weight)
    restored._load_from_checkpoint(str(output / "checkpoint-6"))
    expected = BertForMaskedLM.from_pretrained(output / "checkpoint-6").state_dict()
    for name, tensor in restored.model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    restored.model.surplus = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="surplus"):
        restored._load_from_checkpoint(str(output / "checkpoint-6"))


def refuse_to_save(error):
    def save(*args, **kwargs):
        raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save's words
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path, monkeypatch, error):
    class FillTheDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                monkeypatch.setattr(torch, "save", refuse_to_save(error))

    with pytest.raises(OSError, match="the disk is full") as raised:
        trainer(tmp_path, callbacks=[FillTheDisk()]).train()
    assert raised.value.errno == errno.ENOSPC
    assert f"{tmp_path / 'checkpoint-4'} could not be written" in str(raised.value)
    assert f"{tmp_path / 'checkpoint-2'} is complete, the run goes on from there" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert latest_complete_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", [])


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", refuse_to_save(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"no earlier checkpoint exists"):
        trainer(tmp_path).train()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", refuse_to_save(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trainer(tmp_path).train()
