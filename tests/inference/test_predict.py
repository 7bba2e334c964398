import json
import logging

import pytest
import torch
from tiny_models import tiny_tokenizer, write_classifier, write_mabert
from transformers import AutoModelForSequenceClassification

from mabert.inference.loading import ModelFolderError, load_model
from mabert.inference.predict import Prediction, predict, predict_file

TEXTS = ["the cat sees a dog", "dog", "a bird not likes the horse ?"]
PAIRS = ["a dog hears the cat", "the fish finds", "not"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("model"), labels=("no", "perhaps", "yes"))


def alone(folder, *texts):
    inputs = tiny_tokenizer()(*texts, return_tensors="pt")
    with torch.no_grad():
        return load_model(AutoModelForSequenceClassification, folder)(**inputs).logits[0]


def test_labels_and_probabilities_are_the_models(folder):
    for text, prediction in zip(TEXTS, predict(TEXTS, model_folder=folder), strict=True):
        expected = alone(folder, text).softmax(-1).tolist()
        assert prediction.scores == pytest.approx(dict(zip(("no", "perhaps", "yes"), expected, strict=True)), abs=1e-5)
        assert prediction.label == max(prediction.scores, key=prediction.scores.__getitem__)


def test_pairs_are_read_as_pairs(folder):
    predictions = predict(TEXTS, PAIRS, model_folder=folder)
    for text, partner, prediction in zip(TEXTS, PAIRS, predictions, strict=True):
        expected = alone(folder, text, partner).softmax(-1).tolist()
        assert list(prediction.scores.values()) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="3 texts have 2 partners"):
        predict(TEXTS, PAIRS[:2], model_folder=folder)


def test_regression_gives_numbers(tmp_path):
    folder = write_classifier(tmp_path, labels=("score",))
    predictions = predict(TEXTS, model_folder=folder)
    assert predictions == [
        Prediction(pytest.approx(alone(folder, text).item(), abs=1e-5), {})  # type: ignore[arg-type]
        for text in TEXTS
    ]


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_several_labels_or_numbers_a_text_are_refused(tmp_path, kind):
    folder = write_classifier(tmp_path, problem_type=kind)
    with pytest.raises(ModelFolderError, match=f"trained for {kind} with 2 labels, and a prediction is one label"):
        predict(TEXTS, model_folder=folder)
    predict(TEXTS, model_folder=write_classifier(tmp_path, problem_type="single_label_classification"))


def test_long_texts_are_refused_or_cut_the_longer_of_a_pair_first(folder, caplog):
    long = ["cat " * 40]
    with pytest.raises(ValueError, match=r"text 1 has 42 tokens, more than 32"):
        predict(long, model_folder=folder)
    with caplog.at_level(logging.WARNING):
        (cut,) = predict(long, ["the dog"], model_folder=folder, truncate=True)
    assert "1 of 1 texts were cut to 32 tokens" in caplog.text
    expected = alone(folder, "cat " * 27, "the dog").softmax(-1).tolist()
    assert list(cut.scores.values()) == pytest.approx(expected, abs=1e-5)


def test_a_folder_without_a_trained_head_raises(tmp_path):
    with pytest.raises(ModelFolderError, match="holds no trained MaBertForSequenceClassification"):
        predict(TEXTS, model_folder=write_mabert(tmp_path))
    with pytest.raises(ValueError, match="there are no texts"):
        predict([], model_folder=write_classifier(tmp_path))


@pytest.mark.parametrize("pair_column", [None, "second"])
def test_tables_in_predictions_out(folder, tmp_path, pair_column):
    source = tmp_path / "rows.tsv"
    source.write_text("first\tsecond\n" + "".join(f"{a}\t{b}\n" for a, b in zip(TEXTS, PAIRS, strict=True)))
    options = {"model_folder": folder, "text_column": "first", "text_pair_column": pair_column}
    expected = predict(TEXTS, PAIRS if pair_column else None, model_folder=folder)
    assert predict_file(source, tmp_path / "out.tsv", **options) == expected
    predict_file(source, tmp_path / "out.jsonl", **options)
    header, *lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert header == "index\tlabel\tprobability"
    assert lines == [f"{i}\t{p.label}\t{p.scores[p.label]:.6f}" for i, p in enumerate(expected)]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert records == [{"index": i, "label": p.label, "scores": p.scores} for i, p in enumerate(expected)]


def test_bad_tables_raise(folder, tmp_path):
    source = tmp_path / "rows.tsv"
    source.write_text("first\nthe cat\n" + "cat " * 31 + "\n")
    with pytest.raises(ValueError, match=r"rows.tsv.*text"):
        predict_file(source, tmp_path / "out.tsv", model_folder=folder)
    with pytest.raises(ValueError, match=r"rows.tsv, row 2 has 33 tokens"):
        predict_file(source, tmp_path / "out.tsv", model_folder=folder, text_column="first")
    with pytest.raises(ValueError, match=r"out.txt must end in .tsv or .jsonl"):
        predict_file(source, tmp_path / "out.txt", model_folder=folder, text_column="first")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.tsv"]
