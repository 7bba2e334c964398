import pytest
import torch
from tiny_models import tiny_tokenizer, write_bert, write_classifier, write_mabert
from transformers import AutoModelForMaskedLM

from mabert.inference.fill_mask import fill_mask
from mabert.inference.loading import ModelFolderError, load_model


@pytest.mark.parametrize("write", [write_mabert, write_bert])
def test_fills_are_the_models_most_probable_tokens(tmp_path, write):
    folder = write(tmp_path)
    text = "the [MASK] sees a [MASK] ."
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = load_model(AutoModelForMaskedLM, folder)(**inputs).logits[0]
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
    fills = fill_mask(text, folder, top_k=4)
    assert [len(of_one_mask) for of_one_mask in fills] == [4, 4]
    for place, of_one_mask in zip(places, fills, strict=True):
        best = logits[place].softmax(-1).topk(4)
        assert [fill.token for fill in of_one_mask] == tokenizer.convert_ids_to_tokens(best.indices.tolist())
        assert [fill.probability for fill in of_one_mask] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_the_text_shows_one_mask_filled(tmp_path):
    folder = write_mabert(tmp_path)
    vocabulary = len(tiny_tokenizer())
    first, second = fill_mask("run[MASK] the [MASK].", folder, top_k=vocabulary)
    assert {fill.token: fill.text for fill in first}["cat"] == "runcat the [MASK]."
    assert {fill.token: fill.text for fill in second}["cat"] == "run[MASK] the cat."
    assert {fill.token: fill.text for fill in second}["##ning"] == "run[MASK] thening."
    assert sum(fill.probability for fill in first) == pytest.approx(1.0, abs=1e-5)


def test_bad_input_raises(tmp_path):
    folder = write_mabert(tmp_path / "mlm")
    with pytest.raises(ValueError, match=r"the text has no \[MASK\]: write \[MASK\]"):
        fill_mask("the mask", folder)
    with pytest.raises(ValueError, match=r"text 1 has 33 tokens"):
        fill_mask("[MASK]" + " cat" * 30, folder)
    with pytest.raises(ValueError, match="top_k=0 must lie in 1 to"):
        fill_mask("a [MASK]", folder, top_k=0)
    with pytest.raises(ModelFolderError, match="holds no trained MaBertForMaskedLM"):
        fill_mask("a [MASK]", write_classifier(tmp_path / "classifier"))
