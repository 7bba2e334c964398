"""A causal model goes on with texts."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_mabert, write_transmamba
from transformers import AutoModelForCausalLM, AutoTokenizer

from mabert.inference.generate import generate
from mabert.inference.loading import ModelFolderError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transmamba(tmp_path_factory.mktemp("transmamba"), transpoints=[0, 6])


def test_it_is_the_most_probable_continuation(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the cat sees", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    end = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(["the cat sees"], folder, max_new_tokens=6) == ["the cat sees" + end]


def test_texts_beside_it_change_nothing(folder: Path) -> None:
    texts = ["the cat sees a dog . the dog", "a", "", "not un"]
    alone = [generate([text], folder, max_new_tokens=7)[0] for text in texts]
    assert generate(texts, folder, max_new_tokens=7) == alone


def test_options_change_the_text(folder: Path) -> None:
    texts = ["the cat sees a bird . the bird hears the", "a fish"]
    greedy = generate(texts, folder, max_new_tokens=8)
    drawn = generate(texts, folder, max_new_tokens=8, temperature=3.0)
    assert drawn != greedy
    assert generate(texts, folder, max_new_tokens=8, temperature=3.0) == drawn
    assert generate(texts, folder, max_new_tokens=8, temperature=3.0, seed=1) != drawn
    assert generate(texts, folder, max_new_tokens=8, temperature=3.0, top_p=1e-6) == greedy
    assert generate(texts, folder, max_new_tokens=8, transpoints=[30]) != greedy
    assert [len(text) for text in generate(texts, folder, max_new_tokens=2)] < [len(text) for text in greedy]


def test_every_token_may_be_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GenerationMixin

    seen: dict = {}
    original = GenerationMixin.generate

    def spy(model, *args, **kwargs):
        seen.update(kwargs)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    generate(["a"], folder, max_new_tokens=1, temperature=1.0)
    assert seen["top_k"] == 0


def test_the_callers_random_numbers_are_left_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(["a"], folder, max_new_tokens=2, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"texts": []}, "there are no texts"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 0.5}, "top_p=0.5 has no effect where nothing is drawn"),
        ({"transpoints": [-1]}, "-1 is no number of tokens"),
    ],
)
def test_bad_choices_are_refused(folder: Path, choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"texts": ["a"], "model_folder": folder} | choices)


def test_an_encoder_generates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="holds a mabert model, which is no causal language model"):
        generate(["a"], write_mabert(tmp_path))


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is not a model folder"):
        generate(["a"], tmp_path)
