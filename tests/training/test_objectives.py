"""Any masked language model of transformers is pretrained by the same run."""

import json
from dataclasses import replace

import pytest
import tiny_pretraining
import torch
from tiny_pretraining import config, losses
from transformers import AutoModelForMaskedLM, BertConfig

from mabert.experiments.architectures import BASELINES, Vocabulary, architecture
from mabert.experiments.scales import SCALES
from mabert.training.objectives import head_at, labelled_logits
from mabert.training.pretrain import PretrainConfig, pretrain

SCALE = replace(SCALES["tiny"](), hidden_size=32, num_attention_heads=2, intermediate_size=32, stage_lengths=(16, 32))
MODELS = ["MaBERT", *BASELINES, "ModernBERT"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked-lm")
    tiny_pretraining.prepare(folder)
    return folder


def model_config(name, size=500):
    return architecture(name, SCALE, Vocabulary(size))


@pytest.mark.parametrize("name", MODELS)
def test_the_head_at_the_labels_gives_what_the_whole_head_gives_there(name):
    model = AutoModelForMaskedLM.from_config(model_config(name)).eval()
    ids = torch.randint(5, 500, (3, 32))
    labels = ids.where(torch.rand(3, 32) < 0.3, -100)
    inputs = {"input_ids": ids, "seq_idx": torch.zeros_like(ids)}
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits[labels != -100]
    assert torch.allclose(labelled_logits(model, inputs, labels), expected, atol=1e-5)
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (3, 32, 500)  # no hook is left


def test_seq_idx_goes_to_those_who_know_it_only():
    ids = torch.randint(5, 500, (2, 16))
    given = {}
    for name in ("MaBERT", "BERT"):
        model = AutoModelForMaskedLM.from_config(model_config(name)).eval()
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: given.update({name: kwargs}), with_kwargs=True
        )
        labelled_logits(model, {"input_ids": ids, "seq_idx": torch.zeros_like(ids)}, ids)
    assert "seq_idx" in given["MaBERT"]
    assert "seq_idx" not in given["BERT"]


def test_the_hook_goes_also_after_an_error():
    model = AutoModelForMaskedLM.from_config(model_config("BERT")).eval()

    def fails():
        with head_at(torch.ones(1, 4, dtype=torch.bool), model):
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fails()
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("name", ["BERT", "ALBERT", "Longformer", "BigBird", "DeBERTa", "ModernBERT"])
def test_each_baseline_is_pretrained_and_left_in_a_folder(prepared, tmp_path, name):
    run = config(
        prepared,
        output=str(tmp_path / "run"),
        model=model_config(name),
        packing="full-sentences",
        steps=15,
        learning_rate=1e-2,
    )
    result = pretrain(run)
    first, *_, last = losses(tmp_path / "run")
    assert last < first - 0.3
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    assert model.config.model_type == model_config(name).model_type
    assert result.parameters == model.num_parameters()


def test_the_loss_is_the_mean_over_the_labels_of_the_whole_batch(prepared, tmp_path):
    """Micro-batches of 2 and of 8 rows are one batch, whatever share of the labels each holds."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertConfig(**model_config("BERT").to_diff_dict() | still)
    runs = [
        config(prepared, output=str(tmp_path / str(size)), model=bert, packing="full-sentences", micro_batch_size=size)
        for size in (2, 8)
    ]
    for run in runs:
        pretrain(run)
    assert losses(runs[0].output) == pytest.approx(losses(runs[1].output), abs=2e-4)


def test_a_stopped_baseline_goes_on_with_the_same_losses(prepared, tmp_path):
    choices = {"model": model_config("BERT"), "packing": "full-sentences", "checkpoint_every": 4, "steps": 10}
    pretrain(config(prepared, output=str(tmp_path / "whole"), **choices))
    part = config(prepared, output=str(tmp_path / "part"), **choices)

    from mabert.training import pretrain as module

    class KilledError(Exception):
        pass

    original = module.PretrainTrainer.get_batch_samples

    def killed(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KilledError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.PretrainTrainer, "get_batch_samples", killed)
        with pytest.raises(KilledError):
            pretrain(part)
    pretrain(part)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_several_sequences_in_a_row_are_refused_where_they_would_mix(prepared):
    with pytest.raises(ValueError, match=r"which a bert model would mix\. Take packing='full-sentences'"):
        config(prepared, model=model_config("BERT"))
    config(prepared, model=model_config("MaBERT"))


def test_a_model_of_no_language_is_refused(prepared):
    with pytest.raises(ValueError, match="transformers has no language model, masked or causal, for model_type='vit'"):
        config(prepared, model={"model_type": "vit"})


def test_a_config_is_saved_and_read_again(prepared):
    run = config(prepared, model=model_config("BERT"), packing="full-sentences")
    again = PretrainConfig(**json.loads(json.dumps(run.to_dict())))
    assert again.model.to_diff_dict().keys() - {"vocab_size", "pad_token_id"} <= run.model.to_diff_dict().keys()
    assert again.model.intermediate_size == run.model.intermediate_size
    assert again.to_dict() == run.to_dict()
