import numpy as np
import pytest
import tiny_finetuning
from tiny_models import tiny_tokenizer

from mabert.data.tables import TableError
from mabert.training.finetune_data import load_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_finetuning.prepare(tmp_path_factory.mktemp("tables"))


def load(folder, max_length=32, **changes):
    config = tiny_finetuning.config(folder, folder / "run", **({"max_train_rows": None} | changes))
    return load_data(config, tiny_tokenizer(), max_length)


def keys(split):
    return [tuple(feature["input_ids"]) for feature in split.features]


def test_tables_become_token_ids_and_classes(prepared):
    data = load(prepared)
    assert data.label_names == ("cat", "other")
    assert data.metrics == ("accuracy", "mcc")
    cat = tiny_tokenizer().convert_tokens_to_ids("cat")
    assert len(data.train) == 400
    for row in range(400):
        item = data.train[(0, 0, row)]
        assert (cat in item["input_ids"]) == (item["labels"] == 0)
    assert list(data.evaluation) == ["dev"]
    assert data.selection is None
    assert data.train.subset == data.evaluation["dev"].subset == ""


def test_pairs_have_two_segments(prepared):
    with_pairs, alone = load(prepared, text_pair_column="second"), load(prepared)
    for pair, single in zip(with_pairs.train.features, alone.train.features, strict=True):
        assert pair["input_ids"][: len(single["input_ids"])] == single["input_ids"]
        assert pair["token_type_ids"].count(1) == len(pair["input_ids"]) - len(single["input_ids"]) > 0


def test_numbers_for_regression(prepared):
    data = load(prepared, label_column="cats", regression=True)
    assert data.regression
    assert data.metrics == ("pearson", "spearman")
    assert data.train.labels.dtype == np.float32
    assert set(data.train.labels) >= {0.0, 1.0, 2.0}


def test_without_dev_rows_of_train_are_held_out(prepared):
    everything = keys(load(prepared).train)
    data = load(prepared, dev=None, dev_fraction=0.2)
    dev = data.evaluation["dev"]
    assert (len(data.train), len(dev)) == (320, 80)
    assert sorted(keys(data.train) + keys(dev)) == sorted(everything)
    assert dev.subset == "(held out of train, 80 rows)"
    with_test = load(prepared, dev=None, test=prepared / "dev.tsv")
    assert {name: len(split) for name, split in with_test.evaluation.items()} == {"dev": 40, "test": 80}


@pytest.mark.parametrize("name", ["dev", "test"])
def test_with_dev_from_train_the_given_tables_are_not_even_read(prepared, tmp_path, name):
    everything = keys(load(prepared).train)
    (tmp_path / "broken.tsv").write_text("no table at all")
    data = load(prepared, **{name: tmp_path / "broken.tsv"}, dev_from_train=True, dev_fraction=0.2)
    assert {split: len(rows) for split, rows in data.evaluation.items()} == {"dev": 80}
    assert len(data.train) == 320
    assert sorted(keys(data.train) + keys(data.evaluation["dev"])) == sorted(everything)
    assert data.evaluation["dev"].subset == "(held out of train, 80 rows)"
    load(prepared, test=tmp_path / "gone.tsv", dev=tmp_path / "gone.tsv", dev_from_train=True)
    with pytest.raises(TableError, match=r"broken\.tsv"):
        load(prepared, **{name: tmp_path / "broken.tsv"})


def test_with_dev_from_train_every_run_holds_the_same_rows_out(prepared):
    first = load(prepared, dev_from_train=True, seed=0)
    again = load(prepared, dev_from_train=True, seed=1, learning_rate=1e-4, max_train_rows=50, select="best")
    assert (
        keys(first.evaluation["dev"])
        == keys(again.evaluation["dev"])
        == keys(load(prepared, dev=None).evaluation["dev"])
    )
    assert set(keys(again.train) + keys(again.selection)) <= set(keys(first.train))
    assert len(again.train) == 50


def test_a_glue_task_is_tuned_on_train_alone(tmp_path):
    glue = tiny_finetuning.write_glue(tmp_path)
    everything = load(tmp_path, task="MNLI", glue=glue)
    (glue / "MNLI" / "dev_matched.tsv").unlink()
    (glue / "MNLI" / "dev_mismatched.tsv").write_text("no table at all")
    data = load(tmp_path, task="MNLI", glue=glue, dev_from_train=True, dev_fraction=0.25)
    assert {name: split.subset for name, split in data.evaluation.items()} == {"dev": "(held out of train, 6 rows)"}
    assert data.train.subset == "(subset, 18 rows)"
    assert sorted(keys(data.train) + keys(data.evaluation["dev"])) == sorted(keys(everything.train))
    assert data.label_names == everything.label_names
    with pytest.raises(TableError, match=r"dev_matched\.tsv not found"):
        load(tmp_path, task="MNLI", glue=glue)


def test_selection_is_part_of_train_and_never_of_dev(prepared):
    everything, data = load(prepared), load(prepared, select="best", select_fraction=0.25)
    assert (len(data.train), len(data.selection)) == (300, 100)
    assert sorted(keys(data.train) + keys(data.selection)) == sorted(keys(everything.train))
    assert keys(data.evaluation["dev"]) == keys(everything.evaluation["dev"])


def test_what_is_left_out_does_not_depend_on_the_seed_and_nests(prepared):
    assert keys(load(prepared, dev=None, seed=0).train) == keys(load(prepared, dev=None, seed=1).train)
    few, more = load(prepared, max_train_rows=20, seed=0), load(prepared, max_train_rows=50, seed=1)
    assert (len(few.train), len(more.train)) == (20, 50)
    assert set(keys(few.train)) < set(keys(more.train))
    everything = keys(load(prepared).train)
    assert set(keys(more.train)) < set(everything)
    assert keys(more.train) != everything[:50]


def test_long_rows_are_cut_and_counted(prepared):
    data = load(prepared, text_pair_column="second", max_length=9)
    long = sum(len(feature["input_ids"]) > 9 for feature in load(prepared, text_pair_column="second").train.features)
    assert data.train.truncated == long > 0
    assert max(map(len, keys(data.train))) == 9
    for feature in data.train.features:
        first, second = feature["token_type_ids"].count(0) - 2, feature["token_type_ids"].count(1) - 1
        if len(feature["input_ids"]) == 9 and min(first, second) >= 3:
            assert (first, second) == (3, 3)


def test_glue_tasks_say_that_they_are_subsets(tmp_path):
    glue = tiny_finetuning.write_glue(tmp_path)
    data = load(tmp_path, task="MNLI", glue=glue)
    assert data.label_names == ("entailment", "neutral", "contradiction")
    assert list(data.evaluation) == ["dev_matched", "dev_mismatched"]
    assert [split.subset for split in data.evaluation.values()] == ["(subset, 24 rows; train subset, 24 rows)"] * 2
    assert data.train.subset == "(subset, 24 rows)"
    assert list(data.train.labels[:4]) == [1, 0, 2, 1]


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("text\tlabel\nthe cat\tcat\na dog\tcat\n", {"dev": None}, "bad.tsv: every row has the same label"),
        ("text\tkind\nthe cat\tcat\n", {}, "bad.tsv, line 1: .*label"),
        ("text\tlabel\n" + "a\tcat\nb\tother\n" * 2, {"dev": None}, r"dev_fraction=0.1 of 4 rows leaves none on one"),
        (
            "text\tlabel\n" + "a\tcat\nb\tother\n" * 2,
            {"dev_from_train": True},
            r"bad.tsv: dev_fraction=0.1 of 4 rows leaves none on one side",
        ),
        ("text\tlabel\n" + "a\t1\nb\tmany\n", {"regression": True}, "bad.tsv, line 3: label 'many' is not a number"),
    ],
)
def test_bad_train_tables_raise(prepared, tmp_path, table, changes, message):
    (tmp_path / "bad.tsv").write_text(table)
    with pytest.raises(TableError, match=message):
        load(prepared, train=tmp_path / "bad.tsv", **changes)


def test_a_dev_set_that_cannot_be_scored_raises_before_training(prepared, tmp_path):
    (tmp_path / "one.tsv").write_text("text\tlabel\nthe cat\tcat\na cat\tcat\n")
    with pytest.raises(
        TableError, match=r"one.tsv \(dev, 2 rows\) cannot be scored: Matthews .* every gold label is 0"
    ):
        load(prepared, dev=tmp_path / "one.tsv")
    (tmp_path / "new.tsv").write_text("text\tlabel\nthe cat\tcat\na dog\tdog\n")
    with pytest.raises(TableError, match=r"new.tsv, line 3: label 'dog' is not one of cat, other"):
        load(prepared, dev=tmp_path / "new.tsv")
