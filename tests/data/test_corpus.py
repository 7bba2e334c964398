import gzip
import json
import lzma
import re
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from mabert.data import corpus
from mabert.data.corpus import Corpus, CorpusError, iter_documents

TEXT = "First, ünïcode\u2028line.\r\nSecond line.\n\n \t\n\n  Third.  \n\nFourth.\n"
DOCUMENTS = ["First, ünïcode\u2028line.\nSecond line.", "Third.", "Fourth."]


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in rows)


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_text_files_part_documents_at_empty_lines(tmp_path, suffix, compress):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert list(iter_documents(path)) == DOCUMENTS


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_jsonl(tmp_path, suffix, opener):
    path = tmp_path / f"a.jsonl{suffix}"
    write_jsonl(path, [{"text": "One.\n\nStill one."}, {"text": " "}, {"text": "Two.", "id": 3}], opener)
    assert list(iter_documents(str(path))) == ["One.\n\nStill one.", "Two."]


def test_parquet_and_its_column(tmp_path):
    rows = {"text": [f"Text {i}." for i in range(3000)], "body": [f"Body {i}." for i in range(3000)]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=700)
    assert list(iter_documents(tmp_path / "a.parquet")) == rows["text"]
    assert list(iter_documents(tmp_path / "a.parquet", text_column="body")) == rows["body"]


def test_folders_globs_and_lists_are_read_in_order_and_each_file_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "deep/c.txt", "notes.md", ".hidden.txt", ".tmp-x/half.txt", "z.jsonl.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    assert list(iter_documents(tmp_path)) == ["a.txt", "b.txt", "deep/c.txt", "z.jsonl.txt"]
    assert list(iter_documents(f"{tmp_path}/?.txt")) == ["a.txt", "b.txt"]
    assert list(iter_documents(f"{tmp_path}/**/c.*")) == ["deep/c.txt"]
    assert list(iter_documents([tmp_path / "b.txt", f"{tmp_path}/[ab].txt"])) == ["b.txt", "a.txt"]
    monkeypatch.chdir(tmp_path)
    assert list(iter_documents("*/c.txt")) == ["deep/c.txt"]


def test_a_hub_data_set_is_streamed_from_a_local_folder(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "One.", "body": "B1"}, {"text": "Two.", "body": "B2"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "Three.", "body": "B3"}])
    address = f"hf://{tmp_path}"
    assert list(iter_documents(address)) == ["One.", "Two."]
    assert list(iter_documents(address, text_column="body")) == ["B1", "B2"]
    assert list(iter_documents(f"{address}?split=validation&column=body")) == ["B3"]
    assert Corpus([address]).fraction is None
    with pytest.raises(CorpusError, match=r"row 1: no column 'title'; the columns are text, body"):
        list(iter_documents(f"{address}?column=title"))
    with pytest.raises(CorpusError, match="unknown option spilt; known are config, split and column"):
        list(iter_documents(f"{address}?spilt=train"))
    with pytest.raises(CorpusError, match=r"hf://.*split=test cannot be opened: .*test"):
        list(iter_documents(f"{address}?split=test"))


def test_datasets_is_imported_for_a_hub_source_only_and_named_when_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.txt").write_text("One.")
    assert list(iter_documents(tmp_path)) == ["One."]
    with pytest.raises(ImportError, match=r"hf://owner/name needs the datasets library: pip install"):
        list(iter_documents("hf://owner/name"))


def test_a_corpus_can_be_read_again_and_tells_how_far_it_is(tmp_path):
    for name in ("a.txt", "b.txt.xz"):
        data = "\n\n".join(f"Document {i} of {name}." for i in range(30_000)).encode()
        (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    texts = Corpus(tmp_path)
    assert list(texts) == list(texts)
    fractions = [texts.fraction for _ in texts]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.1
    assert texts.fraction == 1


def test_a_file_is_streamed_and_an_endless_document_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_CHARS", 100)
    (tmp_path / "a.txt").write_text("A line of words.\n" * 1000)
    parts = list(iter_documents(tmp_path))
    assert "\n".join(parts) == "\n".join(["A line of words."] * 1000)
    assert max(map(len, parts)) < 130
    with (tmp_path / "a.txt").open("ab") as file:
        file.write(b"\xff")
    assert next(iter_documents(tmp_path)) == parts[0]  # what comes behind was not read yet


def bad_sources(folder):
    """Yield what is wrong, the source, and the message it must give."""
    (folder / "empty").mkdir()
    (folder / "empty" / "a.md").touch()
    (folder / "a.docx").touch()
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("Good.\n\nSchön.\n".encode("latin-1"))
    packed = lzma.compress("\n".join(f"Line {i * i}." for i in range(1000)).encode())
    (folder / "cut.txt.xz").write_bytes(packed[: len(packed) // 2])
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"Text.\n" * 1000)[:-9])
    (folder / "damaged.txt.gz").write_bytes(b"no gzip at all")
    (folder / "damaged.txt.xz").write_bytes(packed[:200] + b"garbage" + packed[207:])
    (folder / "bad.jsonl").write_text('{"text": "Good."}\n{"text": \n')
    (folder / "list.jsonl").write_text('["text"]\n')
    (folder / "columns.jsonl").write_text('{"title": "A", "body": "B"}\n')
    (folder / "number.jsonl").write_text('{"text": "Good."}\n{"text": 7}\n')
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    parquet.write_table(pa.table({"title": ["A"], "body": ["B"]}), folder / "columns.parquet")
    parquet.write_table(pa.table({"text": ["A", None]}), folder / "null.parquet")
    yield "nothing.txt", r"nothing\.txt: no such file or folder"
    yield "*.text", r"no \.txt .* file matches it as a glob"
    yield "empty", r"empty: no file in this folder ends in \.txt"
    yield "a.docx", r"a\.docx: unknown kind of file; known are \.txt"
    yield "blank.txt", r"the corpus is empty: no text in .*blank\.txt"
    yield "latin.txt", r"latin\.txt, line 3: not UTF-8 .*iconv"
    yield "cut.txt.xz", r"cut\.txt\.xz is truncated after line \d+: copy or download it again"
    yield "cut.txt.gz", r"cut\.txt\.gz is truncated after line"
    yield "damaged.txt.gz", r"damaged\.txt\.gz is damaged after line 0"
    yield "damaged.txt.xz", r"damaged\.txt\.xz is damaged after line"
    yield "bad.jsonl", r"bad\.jsonl, line 2: not JSON \(Expecting value at character"
    yield "list.jsonl", r"list\.jsonl, line 1: a JSON object was expected, not list"
    yield "columns.jsonl", r"columns\.jsonl, line 1: no column 'text'; the columns are title, body"
    yield "number.jsonl", r"number\.jsonl, line 2: column 'text' holds int, not text"
    yield "cut.parquet", r"cut\.parquet is no complete parquet file"
    yield "columns.parquet", r"columns\.parquet: no column 'text'; the columns are title, body"
    yield "null.parquet", r"null\.parquet, row 2: column 'text' holds NoneType, not text"


def test_bad_sources_are_named(tmp_path):
    for source, message in bad_sources(tmp_path):
        with pytest.raises(CorpusError) as caught:
            list(iter_documents(tmp_path / source))
        assert re.search(message, str(caught.value)), (source, str(caught.value))


def test_no_source_and_an_empty_name_are_refused_at_once():
    with pytest.raises(CorpusError, match="no source of text was given"):
        iter_documents([])
    with pytest.raises(CorpusError, match="empty string"):
        iter_documents("")
