import json
from pathlib import Path

import pytest
import torch
from tiny_models import mabert_config, tiny_tokenizer, write_bert, write_mabert
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from mabert import MaBertForMaskedLM
from mabert.data.tokenizer import TokenizerError
from mabert.inference.loading import (
    ModelFolderError,
    default_device,
    load_config,
    load_matching_tokenizer,
    load_model,
    longest_sequence,
)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("write", [write_mabert, write_bert])
def test_weights_are_those_of_the_folder(tmp_path, write):
    folder = write(tmp_path / "model")
    whole = load_model(AutoModelForMaskedLM, folder)
    encoder = load_model(AutoModel, folder)
    for name, weight in encoder.state_dict().items():
        if "pooler" not in name:
            assert torch.equal(weight, whole.state_dict()[f"{whole.base_model_prefix}.{name}"])
    assert not whole.training
    assert whole.dtype == torch.float32


def test_half_precision_weights_are_loaded_as_fp32(tmp_path):
    MaBertForMaskedLM(mabert_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(AutoModel, tmp_path).dtype == torch.float32


@pytest.mark.parametrize("write", [write_mabert, write_bert])
def test_a_new_head_must_be_allowed(tmp_path, write):
    folder = write(tmp_path / "model")
    load_model(AutoModelForSequenceClassification, folder, new_head=True)
    with pytest.raises(ModelFolderError, match=r"holds no trained \w+ForSequenceClassification.*\w+ForMaskedLM"):
        load_model(AutoModelForSequenceClassification, folder)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize(
    ("write", "change"),
    [
        (write_mabert, {"pattern": "MTMM"}),  # a layer's weights are missing
        (write_mabert, {"pattern": "MT"}),  # are left over
        (write_mabert, {"pattern": "MMM"}),  # belong to another kind of layer
        (write_mabert, {"intermediate_size": 64}),  # have another shape
        (write_bert, {"num_hidden_layers": 3}),
        (write_bert, {"num_hidden_layers": 1}),
    ],
)
def test_encoder_weights_that_do_not_fit_raise(tmp_path, write, change, auto_class):
    folder = write(tmp_path / "model")
    change_config(folder, **change)
    with pytest.raises(ModelFolderError, match=r"weights in .*model do not belong to its config.json: \d+ of the"):
        load_model(auto_class, folder, new_head=True)


def test_overrides_reach_the_config_and_are_checked(tmp_path):
    folder = write_mabert(tmp_path / "model")
    assert load_config(folder, execution="padded", psm="pre").psm == "pre"
    with pytest.raises(ValueError, match="execution='packed' never computes"):
        load_config(folder, psm="pre")
    with pytest.raises(ModelFolderError, match=r"the bert model in .* has no setting psm"):
        load_config(write_bert(tmp_path / "bert"), psm="pre")


def test_what_is_not_a_model_folder_raises(tmp_path):
    with pytest.raises(ModelFolderError, match="it does not exist"):
        load_config(tmp_path / "nowhere")
    write_mabert(tmp_path / "run" / "model")
    with pytest.raises(ModelFolderError, match=r"has no config.json: did you mean .*run/model\?"):
        load_config(tmp_path / "run")


def test_cut_off_weights_raise(tmp_path):
    folder = write_mabert(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match="cannot be read"):
        load_model(AutoModel, folder)


def test_tokenizer_must_be_there_and_fit(tmp_path):
    folder = write_mabert(tmp_path / "model")
    config = load_config(folder)
    assert len(load_matching_tokenizer(folder, config)) == config.vocab_size
    config.vocab_size = len(tiny_tokenizer()) - 1
    with pytest.raises(ModelFolderError, match=r"has \d+ tokens, the model's embeddings \d+"):
        load_matching_tokenizer(folder, config)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_matching_tokenizer(folder, config)


def test_the_device_is_the_accelerator_where_one_is_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    for available, device in ((True, "xpu"), (False, "cpu")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda available=available: available)
        assert default_device() == torch.device(device)


def test_longest_sequence(tmp_path):
    config, tokenizer = mabert_config(), tiny_tokenizer()
    assert longest_sequence(config, tokenizer) == 32
    assert longest_sequence(config, tokenizer, 8) == 8
    with pytest.raises(ValueError, match=r"max_length=33 is over the model's maximum of 32 tokens: lower it"):
        longest_sequence(config, tokenizer, 33)
    with pytest.raises(ValueError, match="at least 4"):
        longest_sequence(config, tokenizer, 2)
