import os
from pathlib import Path

import pytest

from mabert.data.glue import GLUE_TASKS, glue_task, load_glue, subset_label
from mabert.data.tables import TableError

HEADERS = {
    "CoLA": None,
    "SST-2": "sentence\tlabel",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
}
DEV_HEADERS = HEADERS | {
    "MNLI": HEADERS["MNLI"].replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5"),
}


def write_task(folder, name, rows=4):
    """Write a task in the official layout, with made-up rows whose fields hold raw quotes."""
    task = GLUE_TASKS[name]
    (folder / name).mkdir()
    for split in task.rows:
        header = (HEADERS if split == "train" else DEV_HEADERS)[name]
        columns = header.lstrip("\ufeff").split("\t") if header else task.columns
        lines = [header] if header else []
        for i in range(rows):
            values = dict.fromkeys(columns, "-")
            values |= {column: f'"{split} {i} {column}' for column in task.text_columns}
            values[task.label_column] = task.labels[i % len(task.labels)]
            lines.append("\t".join(values[column] for column in columns))
        (folder / name / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_each_task_is_read_from_the_official_layout(tmp_path, name):
    write_task(tmp_path, name)
    task = glue_task(name)
    tables = load_glue(tmp_path, name.lower())
    assert list(tables) == ["train", *task.dev_splits] == list(task.rows)
    for split, table in tables.items():
        first, *second = task.text_columns
        assert table.texts == [f'"{split} {i} {first}' for i in range(4)]
        assert table.pairs == ([f'"{split} {i} {second[0]}' for i in range(4)] if second else None)
        assert table.labels == [i % len(task.labels) for i in range(4)]
        assert table.label_names == task.labels


def test_the_eight_scores_of_the_paper():
    assert sum(len(task.dev_splits) for task in GLUE_TASKS.values()) == 8
    assert glue_task("mnli").dev_splits == ("dev_matched", "dev_mismatched")
    assert {name: task.metrics for name, task in GLUE_TASKS.items()} == {
        "CoLA": ("mcc",),
        "SST-2": ("accuracy",),
        "MRPC": ("accuracy", "f1"),
        "QQP": ("accuracy", "f1"),
        "MNLI": ("accuracy",),
        "QNLI": ("accuracy",),
        "RTE": ("accuracy",),
    }


def test_lines_that_the_official_qqp_lacks_fields_in_are_left_out_there_only(tmp_path):
    for name in ("QQP", "QNLI"):
        write_task(tmp_path, name)
        with (tmp_path / name / "train.tsv").open("a") as file:
            file.write("9\tbroken\n")
    assert len(load_glue(tmp_path, "QQP")["train"]) == 4
    with pytest.raises(TableError, match=r"train\.tsv, line 6: 2 fields, but there are 4 columns"):
        load_glue(tmp_path, "QNLI")


def test_missing_files_and_folders_are_listed(tmp_path):
    with pytest.raises(TableError, match=r"RTE/train\.tsv, .*RTE/dev\.tsv not found; RTE in the official GLUE layout"):
        load_glue(tmp_path, "RTE")
    write_task(tmp_path, "MNLI")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(TableError) as caught:
        load_glue(tmp_path, "MNLI")
    missing, expected = str(caught.value).split(" not found; ")
    assert missing == str(tmp_path / "MNLI" / "dev_mismatched.tsv")
    assert expected.endswith("is MNLI/train.tsv, MNLI/dev_matched.tsv, MNLI/dev_mismatched.tsv")


def test_only_the_splits_asked_for_are_read(tmp_path):
    write_task(tmp_path, "MNLI")
    (tmp_path / "MNLI" / "dev_matched.tsv").unlink()
    (tmp_path / "MNLI" / "dev_mismatched.tsv").write_text("no table")
    read = load_glue(tmp_path, "MNLI", splits=("train",))
    assert {split: len(table) for split, table in read.items()} == {"train": 4}
    (tmp_path / "MNLI" / "train.tsv").unlink()
    with pytest.raises(TableError, match=r"MNLI/train\.tsv not found; .* is MNLI/train\.tsv, MNLI/dev_matched\.tsv"):
        load_glue(tmp_path, "MNLI", splits=("train",))


@pytest.mark.parametrize(
    ("name", "nearest"), [("RET", "RTE"), ("mrcp", "MRPC"), ("sst2", "SST-2"), ("xyz", "CoLA, SST-2")]
)
def test_an_unknown_task_fails_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"unknown GLUE task '{name}'; did you mean {nearest}"):
        glue_task(name)


def test_subsets_are_labelled():
    assert subset_label("RTE", "train", 2490) == ""
    assert subset_label(glue_task("qqp"), "dev", 20215) == "(subset, 20215 rows)"


@pytest.mark.skipif("MABERT_GLUE" not in os.environ, reason="MABERT_GLUE names no folder with the GLUE data")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CoLA", {"train": {8551}, "dev": {1043}}),
        ("SST-2", {"train": {67349}, "dev": {872}}),
        ("MRPC", {"train": {3668}, "dev": {408}}),
        ("RTE", {"train": {2490}, "dev": {277}}),
        ("QNLI", {"train": {10475, 104743}, "dev": {5463}}),
        ("QQP", {"train": {10000, 363849}, "dev": {20215, 40430}}),
        ("MNLI", {"train": {10000, 392702}, "dev_matched": {4908, 9815}, "dev_mismatched": {4916, 9832}}),
    ],
)
def test_row_counts_of_the_real_data(name, expected):
    for split, table in load_glue(Path(os.environ["MABERT_GLUE"]), name).items():
        assert len(table) in expected[split]
        assert bool(subset_label(name, split, len(table))) == (len(table) != glue_task(name).rows[split])
