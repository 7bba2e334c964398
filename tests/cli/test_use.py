"""`mabert predict`, `fill-mask`, `generate`, `encode` hand every option on and say what they wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_classifier, write_mabert, write_transmamba
from typer.testing import CliRunner, Result

from mabert.inference.encode import encode
from mabert.inference.fill_mask import fill_mask
from mabert.inference.generate import generate
from mabert.inference.predict import predict
from mabert_cli.app import app

TEXTS = ["the cat sees a dog .", "a bird", "the fish likes the horse . the horse finds a fish"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mabert(tmp_path_factory.mktemp("mlm"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "new.tsv"
    rows = [f"{text}\t{text[::-1]}" for text in TEXTS]
    path.write_text("\n".join(["sentence\tother", *rows]) + "\n", encoding="utf-8")
    return path


def test_predict_writes_a_label_a_row(classifier: Path, table: Path, tmp_path: Path) -> None:
    result = run("predict", classifier, table, "--output", tmp_path / "out.tsv", "--text-column", "sentence")
    assert result.exit_code == 0, result.output
    assert "3 predictions in" in result.output
    lines = (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == [p.label for p in predict(TEXTS, model_folder=classifier)]


def test_predict_reads_pairs(classifier: Path, table: Path, tmp_path: Path) -> None:
    columns = ["--text-column", "sentence", "--text-pair-column", "other"]
    assert run("predict", classifier, table, "-o", tmp_path / "a.jsonl", *columns).exit_code == 0
    assert run("predict", classifier, table, "-o", tmp_path / "b.jsonl", *columns[:2]).exit_code == 0
    assert (tmp_path / "a.jsonl").read_text() != (tmp_path / "b.jsonl").read_text()


@pytest.mark.parametrize("command", ["predict", "encode"])
def test_a_long_text_is_refused_or_cut(
    command: str, model: Path, classifier: Path, table: Path, tmp_path: Path
) -> None:
    words = {
        "predict": ["predict", classifier, table, "--output", tmp_path / "out.tsv"],
        "encode": ["encode", model, table, tmp_path / "out.npy"],
    }[command]
    words += ["--text-column", "sentence", "--max-length", "8"]
    refused = run(*words)
    assert refused.exit_code == 2
    assert "row 3 has 13 tokens" in " ".join(refused.stderr.split())
    assert run(*words, "--truncate").exit_code == 0


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    model: Path, classifier: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "predicting": ["predict", classifier, table, "--output", tmp_path / "out.tsv"],
        "encoding": ["encode", model, table, tmp_path / "out.npy"],
    }
    for what, command in words.items():
        command += ["--text-column", "sentence", "--batch-tokens", "1"]
        assert what not in run(*command).stderr
    monkeypatch.setattr("mabert.inference.batches.SECONDS_BETWEEN_LINES", 0)
    for what, command in words.items():
        result = run(*command)
        assert f"{what}: 1 of 3, 0:00:" in result.stderr
        assert what not in result.stdout


def test_fill_mask_shows_the_most_probable_tokens(model: Path) -> None:
    result = run("fill-mask", model, "the [MASK] sees a [MASK] .", "--top-k", "3")
    assert result.exit_code == 0, result.output
    expected = fill_mask("the [MASK] sees a [MASK] .", model, top_k=3)
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 6
    for line, fill in zip(lines, (fill for fills in expected for fill in fills), strict=True):
        probability, token = line.split()[:2]
        assert (probability, token) == (f"{fill.probability:.1%}", fill.token)
        assert fill.text in line


def test_fill_mask_needs_a_mask(model: Path) -> None:
    result = run("fill-mask", model, "no mask here")
    assert result.exit_code == 2
    assert "write [MASK] where" in " ".join(result.stderr.split())


def test_generate_goes_on_with_each_text(tmp_path: Path) -> None:
    folder, texts = write_transmamba(tmp_path / "model"), ["the cat sees", "a"]
    result = run("generate", folder, *texts, "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == generate(texts, folder, max_new_tokens=4)
    options = ["--temperature", "2", "--top-p", "0.9", "--seed", "3", "--transpoints", "0,5"]
    drawn = run("generate", folder, *texts, "--max-new-tokens", "4", *options)
    choices = {"temperature": 2.0, "top_p": 0.9, "seed": 3, "transpoints": [0, 5]}
    assert drawn.stdout.splitlines() == generate(texts, folder, max_new_tokens=4, **choices)
    assert run("generate", folder, "a", "--transpoints", "V11").exit_code == 2


def test_encode_writes_a_vector_a_line(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    result = run("encode", model, source, tmp_path / "out.npy")
    assert result.exit_code == 0, result.output
    assert "3 vectors of 16 numbers in" in result.output
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), encode(TEXTS, model), atol=1e-6)


def test_encode_hands_its_options_on(model: Path, table: Path, tmp_path: Path) -> None:
    options = ["--text-column", "other", "--pooling", "cls", "--normalize"]
    assert run("encode", model, table, tmp_path / "out.npy", *options).exit_code == 0
    expected = encode([text[::-1] for text in TEXTS], model, pooling="cls", normalize=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_encode_takes_the_precision(model: Path, table: Path, tmp_path: Path) -> None:
    assert run("encode", model, table, tmp_path / "out.npy", "--text-column", "sentence", "--bf16").exit_code == 0
    difference = np.abs(np.load(tmp_path / "out.npy") - encode(TEXTS, model)).max()
    assert 0 < difference < 0.1


def test_predict_takes_the_precision(classifier: Path, table: Path, tmp_path: Path) -> None:
    words = ["predict", classifier, table, "-o", tmp_path / "out.jsonl", "--text-column", "sentence", "--bf16"]
    assert run(*words).exit_code == 0
    rows = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    exact = [prediction.scores["yes"] for prediction in predict(TEXTS, model_folder=classifier)]
    difference = max(abs(row["scores"]["yes"] - score) for row, score in zip(rows, exact, strict=True))
    assert 0 < difference < 0.1


@pytest.mark.parametrize("command", ["predict", "encode"])
def test_the_size_of_a_batch_is_handed_on(
    command: str, model: Path, classifier: Path, table: Path, tmp_path: Path
) -> None:
    words = {
        "predict": ["predict", classifier, table, "--output", tmp_path / "out.tsv"],
        "encode": ["encode", model, table, tmp_path / "out.npy"],
    }[command]
    refused = run(*words, "--text-column", "sentence", "--batch-tokens", "0")
    assert refused.exit_code == 2
    assert "batch_tokens=0" in refused.stderr


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    result = run("fill-mask", tmp_path, "the [MASK]")
    assert result.exit_code == 2
    assert "is not a model folder" in " ".join(result.stderr.split())
