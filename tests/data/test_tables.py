import gzip
import json
import logging
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from mabert.data.tables import TableError, read_table

ROWS = [("The cat\u2028sees.", 'a "raw, quote', "yes"), ("Ünïcode", "", "no"), ("Third", "partner", "yes")]


def write_rows(path, rows=ROWS, columns=("first", "second", "label")):
    """Write rows in the format that the suffix names."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".tsv"):
        data = "".join("\t".join(map(str, row)) + "\r\n" for row in [columns, *rows]).encode()
    elif name.endswith(".csv"):
        quoted = ['"{}"'.format(str(value).replace('"', '""')) for row in [columns, *rows] for value in row]
        width = len(columns)
        data = "".join(",".join(quoted[i : i + width]) + "\n" for i in range(0, len(quoted), width)).encode()
    elif name.endswith(".jsonl"):
        data = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows).encode()
    else:
        parquet.write_table(pa.table(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))), path)
        return path
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet", "a.tsv.gz", "a.csv.gz", "a.jsonl.gz"])
def test_every_format_gives_the_same_table(tmp_path, name):
    path = write_rows(tmp_path / name)
    table = read_table(path, text_columns=["first", "second"], label_column="label")
    assert table.path == path
    assert table.texts == [row[0] for row in ROWS]
    assert table.pairs == [row[1] for row in ROWS]
    assert table.labels == [1, 0, 1]
    assert table.label_names == ("no", "yes")
    assert len(table) == 3
    swapped = read_table(path, text_columns=["second"], label_column="label", labels=["yes", "no"])
    assert (swapped.texts, swapped.pairs) == ([row[1] for row in ROWS], None)
    assert (swapped.labels, swapped.label_names) == ([0, 1, 0], ("yes", "no"))
    unlabelled = read_table(path, text_columns=["first"])
    assert (unlabelled.labels, unlabelled.label_names) == (None, None)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet"])
def test_number_labels_are_ordered_by_value_or_read_for_regression(tmp_path, name):
    path = write_rows(tmp_path / name, [("a", 10), ("b", 9), ("c", -1)], ("text", "score"))
    table = read_table(path, text_columns=["text"], label_column="score")
    assert (table.labels, table.label_names) == ([2, 1, 0], ("-1", "9", "10"))
    table = read_table(path, text_columns=["text"], label_column="score", regression=True)
    assert (table.labels, table.label_names) == ([10.0, 9.0, -1.0], None)


def test_raw_quotes_in_tsv_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open\t0\nclosed"\t1\n""both""\t0\n')
    table = read_table(tmp_path / "a.tsv", text_columns=["text"], label_column="label")
    assert table.texts == ['"open', 'closed"', '""both""']


def test_empty_lines_are_passed_over_even_where_there_is_one_column(tmp_path):
    for name in ("a.tsv", "a.csv"):
        (tmp_path / name).write_text("text\nFirst.\n\nSecond.\n\n")
        assert read_table(tmp_path / name, text_columns=["text"]).texts == ["First.", "Second."]


def test_csv_fields_hold_commas_line_breaks_and_long_documents(tmp_path):
    long = "word " * 40_000
    (tmp_path / "a.csv").write_text(f'text,label\n"One, two\nthree ""four""",0\n"{long}",1\n\n')
    table = read_table(tmp_path / "a.csv", text_columns=["text"], label_column="label")
    assert table.texts == ['One, two\nthree "four"', long]


def test_columns_name_those_of_a_file_without_a_header(tmp_path):
    (tmp_path / "a.tsv").write_text("src\t1\tFirst.\nsrc\t0\tSecond.\n")
    options = {"text_columns": ["text"], "label_column": "label", "columns": ["source", "label", "text"]}
    assert read_table(tmp_path / "a.tsv", **options).texts == ["First.", "Second."]
    (tmp_path / "a.csv").write_text("src,1,First.\n")
    assert read_table(tmp_path / "a.csv", **options).texts == ["First."]


def test_incomplete_lines_are_left_out_on_request_and_counted(tmp_path, caplog):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\nGood\t1\nhalf\nof a text\t1\t1\n\nAlso good\t0\n")
    with pytest.raises(TableError, match=r"a\.tsv, line 3: 1 fields, but there are 2 columns \(text, label\)"):
        read_table(path, text_columns=["text"], label_column="label")
    with caplog.at_level(logging.WARNING, "mabert"):
        table = read_table(path, text_columns=["text"], label_column="label", skip_incomplete=True)
    assert table.texts == ["Good", "Also good"]
    assert "left out 2 lines without all fields, the first is 3" in caplog.text


BAD_TABLES = [
    ("a.tsv", "first\tlabel\nA\t1\n", r"a\.tsv, line 1: no column 'text'; the columns are first, label"),
    ("a.tsv", "text\tgold\nA\t1\n", r"a\.tsv, line 1: no column 'label'; the columns are text, gold"),
    ("a.csv", "text,gold\nA,1\n", r"a\.csv, line 1: no column 'label'; the columns are text, gold"),
    ("a.tsv", "", r"a\.tsv is empty: it holds no row"),
    ("a.tsv", "text\tlabel\n", r"a\.tsv is empty: it holds no row"),
    ("a.tsv", "text\tlabel\nA\t1\nB\t\n", r"a\.tsv, line 3: the label \(column 'label'\) is empty"),
    ("a.tsv", "text\tlabel\nA\t1\nB\t2\t3\n", r"a\.tsv, line 3: 3 fields, but there are 2 columns"),
    ("a.tsv", "text\tlabel\nA\t1\nB\t5\n", r"a\.tsv, line 3: label '5' is not one of 0, 1"),
    ("a.tsv", b"text\tlabel\nA\t1\nSch\xf6n\t1\n", r"a\.tsv, line 3: not UTF-8"),
    ("a.tsv.gz", gzip.compress(b"text\tlabel\nA\t1\n", mtime=0)[:-6], r"a\.tsv\.gz is truncated after line 2"),
    ("a.csv", "text,label\nA,1\nB, and more,1\n", r"a\.csv, line 3: 3 fields, .* a comma needs quotes"),
    ("a.csv", 'text,label\nA,1\n"B,1\nC,1\n', r"a\.csv, line 4: unexpected end of data; is a quote missing"),
    ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "B"}\n', r"a\.jsonl, line 2: no column 'label'; .* text$"),
    (
        "a.jsonl",
        '{"text": "A", "label": 1}\n{"text": "B", "label": null}\n',
        r"a\.jsonl, line 2: the label .* is empty",
    ),
    ("a.jsonl", '{"text": null, "label": 1}\n', r"a\.jsonl, line 1: column 'text' holds None, which is no text"),
    ("a.jsonl", '{"text": "A", "label": 1}\n{"text"\n', r"a\.jsonl, line 2: not JSON"),
    ("a.parquet", "", r"a\.parquet is no complete parquet file"),
    ("a.xlsx", "", r"a\.xlsx: unknown kind of table; known are \.tsv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TABLES)
def test_bad_tables_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TableError) as caught:
        read_table(tmp_path / name, text_columns=["text"], label_column="label", labels=["0", "1"])
    assert re.search(message, str(caught.value))


def test_other_bad_input(tmp_path):
    with pytest.raises(TableError, match=r"none\.tsv does not exist"):
        read_table(tmp_path / "none.tsv", text_columns=["text"])
    path = write_rows(tmp_path / "a.parquet")
    with pytest.raises(TableError, match=r"a\.parquet: no column 'text'; the columns are first, second, label"):
        read_table(path, text_columns=["text"])
    for label in ("high", "nan", "inf"):
        path = write_rows(tmp_path / "b.tsv", [("A", "1.5"), ("B", label)], ("text", "score"))
        with pytest.raises(TableError, match=rf"b\.tsv, line 3: label '{label}' is not a number"):
            read_table(path, text_columns=["text"], label_column="score", regression=True)
    with pytest.raises(ValueError, match="one or two text columns are needed, not 3"):
        read_table(path, text_columns=["text", "score", "text"])
