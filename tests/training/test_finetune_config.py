import json

import pytest

from mabert.training.finetune_config import FinetuneConfig


def config(**changes):
    return FinetuneConfig(**({"model": "pretrained", "output": "run", "train": "train.tsv"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"max_length": 2}, "max_length=2 must be at least 4"),
        ({"max_train_rows": 0}, "max_train_rows=0 must be at least 1"),
        ({"dev_fraction": 1.0}, "dev_fraction=1.0 must be between 0 and 1"),
        ({"select_fraction": 0.0}, "select_fraction=0.0 must be between 0 and 1"),
        ({"select": "first"}, "select='first' must be one of last, best"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction=1.0 must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"psm": "both"}, r"psm='both' must be one of none, pre, post, pre\+post, exact"),
        ({"pooling": "max"}, "pooling='max' must be one of map"),
        ({"batch_size": 32, "micro_batch_size": 5}, "micro_batch_size=5 must divide batch_size=32"),
        ({"train": None}, "either a GLUE task"),
        ({"task": "RTE", "glue": "glue"}, "either a GLUE task"),
        ({"train": None, "task": "RTE"}, "task='RTE' needs glue"),
        ({"train": None, "task": "RT", "glue": "glue"}, r"unknown GLUE task 'RT'; did you mean RTE"),
        ({"train": None, "task": "RTE", "glue": "glue", "regression": True}, "regression belongs to a table"),
        ({"train": None, "task": "RTE", "glue": "glue", "dev": "dev.tsv"}, "dev belongs to a table"),
        ({"glue": "glue"}, "glue is given without a task"),
        (
            {"select_fraction": 0.25},
            "select_fraction=0.25 is of rows to select the best epoch by, but select='last': .* set select=best",
        ),
        (
            {"dev": "dev.tsv", "dev_fraction": 0.2},
            r"dev_fraction=0.2 would hold rows of train out as dev, but dev='dev.tsv' is given: .*dev_from_train=true",
        ),
        (
            {"train": None, "task": "RTE", "glue": "glue", "dev_fraction": 0.2},
            "dev_fraction=0.2 would hold rows of train out as dev, but the task has a dev set",
        ),
    ],
)
def test_bad_choices_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_overrides_are_what_was_given():
    assert config().overrides == ()
    assert config(psm="pre", execution="padded").overrides == (("execution", "padded"), ("psm", "pre"))


@pytest.mark.parametrize(
    ("changes", "holds_dev_out"),
    [
        ({}, True),
        ({"test": "test.tsv"}, True),
        ({"dev": "dev.tsv"}, False),
        ({"train": None, "task": "RTE", "glue": "glue"}, False),
    ],
)
def test_dev_is_a_part_of_train_where_none_is_given_or_where_that_is_asked_for(changes, holds_dev_out):
    assert config(**changes).holds_dev_out == holds_dev_out
    assert config(**changes, dev_from_train=True, dev_fraction=0.2).holds_dev_out


def test_a_task_has_one_name():
    assert config(train=None, task="rte", glue="glue") == config(train=None, task="RTE", glue="glue")


def test_a_run_goes_on_with_its_own_choices_only(tmp_path):
    config(seed=1).save(tmp_path)
    assert json.loads((tmp_path / "finetune_config.json").read_text())["train"] == "train.tsv"
    config(seed=1, output="moved", workers=2, checkpoint_every=5, log_every=1, micro_batch_size=16).check_resumes(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"other choices: epochs was 3, is now 4; seed was 1, is now 2\. Take the old"):
        config(seed=2, epochs=4).check_resumes(tmp_path)


MODEL_FILES = ("model/config.json", "model/model.safetensors", "model/tokenizer.json")


@pytest.mark.parametrize("source", ["tables", "glue"])
@pytest.mark.parametrize("changed", [*MODEL_FILES, "train", "dev", "model/README.md"])
def test_a_run_goes_on_with_the_files_it_began_with_only(tmp_path, source, changed):
    folder = tmp_path if source == "tables" else tmp_path / "glue" / "RTE"
    data = {"train": folder / "train.tsv", "dev": folder / "dev.tsv"}
    for path in (*data.values(), *(tmp_path / name for name in (*MODEL_FILES, "model/README.md"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    begun = config(model=tmp_path / "model", **data if source == "tables" else glue_task_in(tmp_path))
    begun.save(tmp_path)
    path = data.get(changed, tmp_path / changed)
    path.write_text("changed")
    if changed == "model/README.md":
        begun.check_resumes(tmp_path)
    else:
        with pytest.raises(ValueError, match=f"began with other content of {path}. Put it back"):
            begun.check_resumes(tmp_path)
    path.unlink()
    begun.check_resumes(tmp_path)  # a finished run outlives what it was made from


def glue_task_in(folder):
    return {"train": None, "task": "RTE", "glue": folder / "glue"}


@pytest.mark.parametrize("source", ["tables", "glue"])
def test_a_run_that_holds_dev_out_of_train_reads_no_other(tmp_path, source):
    data = {"train": "a.tsv", "dev": "b.tsv", "test": "c.tsv"} if source == "tables" else glue_task_in(tmp_path)
    names = [path.name for path in config(**data, dev_from_train=True).reads]
    assert names == ["a.tsv" if source == "tables" else "train.tsv"]
