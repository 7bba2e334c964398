import gzip
import logging
import random

import numpy as np
import pytest
import torch
from tiny_models import sentence, tiny_tokenizer, write_bert, write_classifier, write_mabert
from transformers import AutoModel

from mabert.inference import batches
from mabert.inference import encode as encode_module
from mabert.inference.batches import length_batches
from mabert.inference.encode import encode, encode_file
from mabert.inference.loading import ModelFolderError, load_model
from mabert.models import MaBertForSequenceClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mabert(tmp_path_factory.mktemp("mlm"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [sentence(rng) for _ in range(9)] + ["", "the cat", "the cat"]


def alone(folder, text):
    """The encoder's output for one text, (L, H), without padding."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        return load_model(AutoModel, folder)(ids).last_hidden_state[0].numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("write", [write_mabert, write_bert])
def test_vectors_are_those_of_each_text_alone(tmp_path, texts, pooling, write):
    folder = write(tmp_path)
    vectors = encode(texts, folder, pooling=pooling)
    assert vectors.dtype == np.float32
    for text, vector in zip(texts, vectors, strict=True):
        states = alone(folder, text)
        np.testing.assert_allclose(vector, states.mean(0) if pooling == "mean" else states[0], atol=1e-5)


def test_map_vectors_are_what_the_classifier_reads(classifier, texts):
    model = load_model(encode_module.AutoModelForSequenceClassification, classifier)
    assert isinstance(model, MaBertForSequenceClassification)
    read = []
    model.classifier.register_forward_hook(lambda module, inputs, output: read.append(inputs[0][0].numpy()))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tiny_tokenizer()(text)["input_ids"]]))
    np.testing.assert_allclose(encode(texts, classifier, pooling="map"), np.stack(read), atol=1e-5)


@pytest.mark.parametrize("pooling", ["map", "cls", "mean"])
def test_batches_do_not_matter(classifier, texts, pooling, monkeypatch):
    together = encode(texts, classifier, pooling=pooling)
    np.testing.assert_allclose(encode(texts, classifier, pooling=pooling, batch_tokens=1), together, atol=1e-5)
    monkeypatch.setattr(encode_module, "WINDOW", 5)
    np.testing.assert_allclose(encode(texts, classifier, pooling=pooling), together, atol=1e-5)


def test_default_pooling_suits_the_folder(folder, classifier, tmp_path, texts):
    np.testing.assert_array_equal(encode(texts, folder), encode(texts, folder, pooling="mean"))
    np.testing.assert_array_equal(encode(texts, classifier), encode(texts, classifier, pooling="map"))
    by_cls = write_classifier(tmp_path / "cls", pooling="cls")
    np.testing.assert_array_equal(encode(texts, by_cls), encode(texts, by_cls, pooling="mean"))
    for untrained in (folder, by_cls):
        with pytest.raises(ModelFolderError, match="no classification head trained with pooling='map'"):
            encode(texts, untrained, pooling="map")
    with pytest.raises(ValueError, match="pooling='max' is not one of 'map', 'cls', 'mean'"):
        encode(texts, folder, pooling="max")


def test_normalized_vectors_have_length_1(folder, texts):
    vectors = encode(texts, folder)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert abs(lengths - 1).max() > 0.1
    np.testing.assert_allclose(encode(texts, folder, normalize=True), vectors / lengths, atol=1e-6)


def test_bf16_changes_the_arithmetic(folder, texts):
    exact, rough = encode(texts, folder), encode(texts, folder, bf16=True)
    assert 0 < abs(exact - rough).max() < 0.1


def test_no_texts_no_vectors(folder):
    assert encode([], folder).shape == (0, 16)


def test_long_texts_are_refused_before_any_work_or_cut(folder, texts, monkeypatch, caplog):
    long = [*texts, "cat " * 31]
    monkeypatch.setattr(encode_module, "WINDOW", 5)
    with monkeypatch.context() as patch:
        patch.setattr(encode_module.Runner, "run", lambda *_: pytest.fail("work was begun"))
        with pytest.raises(ValueError, match="text 13 has 33 tokens, more than 32: shorten or split it"):
            encode(long, folder)
    with caplog.at_level(logging.WARNING):
        cut = encode(long, folder, truncate=True)
    assert "1 of 13 texts were cut to 32 tokens" in caplog.text
    np.testing.assert_allclose(cut[-1], alone(folder, "cat " * 30).mean(0), atol=1e-5)
    with pytest.raises(ValueError, match=r"tokens, more than 6 \(and \d others"):
        encode(texts, folder, max_length=6)
    with pytest.raises(ValueError, match="max_length=33 is over the model's maximum"):
        encode(texts, folder, max_length=33)


def test_files_give_the_vectors_of_their_lines(folder, texts, tmp_path):
    vectors = encode(texts, folder)
    plain = tmp_path / "texts.txt"
    plain.write_text("".join(f"{text}\n" for text in texts))
    packed = tmp_path / "texts.txt.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "texts.csv"
    table.write_text("id,body\n" + "".join(f"{index},{text}\n" for index, text in enumerate(texts) if text))
    for source in (plain, packed):
        assert encode_file(source, tmp_path / "vectors.npy", folder) == (12, 16)
        np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), vectors)
    assert encode_file(table, tmp_path / "vectors.npy", folder, text_column="body", pooling="cls") == (11, 16)
    expected = encode([text for text in texts if text], folder, pooling="cls")
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), expected)


def test_a_failure_leaves_the_output_as_it_was(folder, texts, tmp_path, monkeypatch):
    source, output = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    source.write_text("\n".join(texts))
    encode_file(source, output, folder)
    before = output.read_bytes()
    monkeypatch.setattr(encode_module, "WINDOW", 5)
    run = encode_module.Runner.run
    calls = []

    def fail_at_the_second(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(encode_module.Runner, "run", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        encode_file(source, output, folder)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "vectors.npy"]


def test_bad_sources_raise(folder, tmp_path):
    output = tmp_path / "vectors.npy"
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt holds no text"):
        encode_file(tmp_path / "empty.txt", output, folder)
    with pytest.raises(ValueError, match="name the column with the text"):
        encode_file(tmp_path / "table.tsv", output, folder)
    with pytest.raises(ValueError, match=r"vectors.bin must end in .npy"):
        encode_file(tmp_path / "empty.txt", tmp_path / "vectors.bin", folder)
    (tmp_path / "long.txt").write_text("the cat\n" + "cat " * 31)
    with pytest.raises(ValueError, match=r"long.txt, line 2 has 33 tokens"):
        encode_file(tmp_path / "long.txt", output, folder)
    (tmp_path / "latin.txt").write_bytes(b"the cat\n\xe9t\xe9\n")
    with pytest.raises(ValueError, match=r"latin.txt, line 2: not UTF-8"):
        encode_file(tmp_path / "latin.txt", output, folder)
    assert not output.exists()
    with pytest.raises(ValueError, match="batch_tokens=0"):
        encode(["the cat"], folder, batch_tokens=0)


def test_damaged_weights_raise(tmp_path):
    folder = write_mabert(tmp_path)
    model = load_model(AutoModel, folder)
    model.norm.weight.data[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(["the cat"], folder)


def test_progress_goes_to_the_error_stream(folder, texts, capsys, monkeypatch):
    encode(texts, folder, progress=True)
    assert capsys.readouterr() == ("", "")  # it was done within half a minute
    monkeypatch.setattr(batches, "SECONDS_BETWEEN_LINES", 0)
    encode(texts, folder, batch_tokens=1)
    assert capsys.readouterr() == ("", "")
    encode(texts, folder, batch_tokens=1, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 12
    assert lines[4] == "encoding: 5 of 12, 0:00:00 left"


def test_batches_hold_similar_lengths_within_the_budget():
    lengths = [3, 40, 5, 5, 4, 12, 3]
    found = list(length_batches(lengths, 16))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert found[0] == [1]
    for batch in found[1:]:
        assert len(batch) * max(lengths[index] for index in batch) <= 16
    assert [max(lengths[index] for index in batch) for batch in found] == [40, 12, 5, 3]
    assert list(length_batches(lengths, 1)) == [[1], [5], [2], [3], [4], [0], [6]]
