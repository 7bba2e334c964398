"""`mabert tokenizer`: from text to a tokenizer folder."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mabert_cli.app import app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The first Document speaks.\n\nthe second document listens.\n" * 20, encoding="utf-8")
    return path


def train(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])


def test_it_trains_and_saves_what_transformers_loads(tmp_path: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    result = train(text, "--output", tmp_path / "new", "--vocab-size", "80", "--max-length", "64")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(tokenizer) <= 80
    assert f"{len(tokenizer)} tokens in" in result.output
    assert tokenizer.model_max_length == 64
    assert tokenizer.tokenize("The document") == tokenizer.tokenize("the Document") == ["the", "document"]


def test_options_reach_the_tokenizer(tmp_path: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    assert train(text, "--output", tmp_path / "cased", "--cased").exit_code == 0
    assert train(text, "--output", tmp_path / "rare", "--min-frequency", "1000").exit_code == 0
    cased, rare = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("cased", "rare"))
    assert cased.tokenize("The") != cased.tokenize("the")
    assert "document" in cased.get_vocab()
    assert "document" not in rare.get_vocab()


def test_the_text_column_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "words in a body"}\n' * 5, encoding="utf-8")
    assert train(path, "--output", tmp_path / "new", "--text-column", "body").exit_code == 0
    refused = train(path, "--output", tmp_path / "other")
    assert refused.exit_code == 2
    assert "no column 'text'" in refused.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path, text: Path) -> None:
    result = train(text, "--output", tmp_path / "new", "--dry-run")
    assert result.exit_code == 0
    assert str(text) in "".join(result.output.split()), "a long path is folded, and not cut"
    assert "30,522" in result.output
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path, text: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("mine", encoding="utf-8")
    result = train(text, "--output", tmp_path / "old")
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["mine"]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    result = train(tmp_path / "empty.txt", "--output", tmp_path / "new")
    assert result.exit_code == 2
    assert "the corpus is empty" in result.stderr
    assert not (tmp_path / "new").exists()


def test_progress_is_a_line_now_and_then_without_a_terminal(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "reading" not in train(text, "--output", tmp_path / "quick").stderr
    monkeypatch.setattr("mabert.inference.batches.SECONDS_BETWEEN_LINES", 0)
    assert "reading: 1 documents" in train(text, "--output", tmp_path / "slow").stderr
