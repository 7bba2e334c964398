"""The encoders that are compared: as large as published at base, as large as MaBERT below it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from mabert.experiments.architectures import (
    BASELINES,
    MABERTS,
    PUBLISHED_LONGEST,
    Vocabulary,
    architecture,
    encoder_parameters,
)
from mabert.experiments.pretraining import copy_local_to_global
from mabert.experiments.published import published
from mabert.experiments.scales import SCALES

OTHERS = [*BASELINES, "ModernBERT", "MMMMMMMMMMMM", "TTTTTTTTTTTT", "TTTTTTTTTTTT+rope", *MABERTS]
VOCABULARY = Vocabulary(1000, pad_token_id=0, cls_token_id=2, sep_token_id=3)


@pytest.mark.parametrize("scale", ["tiny", "cpu", "mini", "small"])
@pytest.mark.parametrize("name", OTHERS)
def test_below_base_all_have_as_many_parameters_outside_the_embeddings(name, scale):
    chosen = SCALES[scale]()
    ours = encoder_parameters(architecture("MaBERT", chosen, VOCABULARY))
    theirs = encoder_parameters(architecture(name, chosen, VOCABULARY))
    assert theirs == pytest.approx(ours, rel=0.006)


@pytest.mark.parametrize("name", MABERTS)
def test_at_base_too_scan_directions_have_as_many_parameters(name):
    ours, theirs = (encoder_parameters(architecture(of, SCALES["base"](), VOCABULARY)) for of in ("MaBERT", name))
    assert theirs == pytest.approx(ours, rel=0.001)


def test_parameters_of_an_encoder_are_counted_without_tables_and_pooler():
    config = architecture("BERT", SCALES["tiny"](), VOCABULARY)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layer." in name)
    norm = 2 * config.hidden_size
    assert encoder_parameters(config) == layers + norm


def test_albert_counts_as_if_its_layers_shared_nothing():
    config = architecture("ALBERT", SCALES["tiny"](), VOCABULARY)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    layer = sum(p.numel() for name, p in model.named_parameters() if "albert_layer_groups" in name)
    rest = encoder_parameters(config) - 12 * layer
    assert 0 < rest < layer


def test_longformer_counts_without_what_pretraining_does_not_reach():
    """Its matched size holds all that a step of masked language modelling has gradients for, and nothing else."""
    config = architecture("Longformer", SCALES["tiny"](), VOCABULARY)
    model = AutoModelForMaskedLM.from_config(config)
    ids = torch.arange(10, 26)[None]
    model(ids, labels=ids).loss.backward()
    reached = [
        parameter.numel()
        for name, parameter in model.base_model.named_parameters()
        if parameter.grad is not None and "_embeddings" not in name
    ]
    assert encoder_parameters(config) == sum(reached)
    assert any("_global" in name for name, parameter in model.named_parameters() if parameter.grad is None)


def test_longformers_global_attention_begins_fine_tuning_as_its_local_one(tmp_path):
    torch.manual_seed(0)
    config = architecture("Longformer", SCALES["tiny"](), VOCABULARY)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    copy_local_to_global(tmp_path / "model.safetensors")
    after = AutoModelForMaskedLM.from_pretrained(tmp_path).state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert {name.split(".")[-2] for name in changed} == {"query_global", "key_global", "value_global"}
    assert len(changed) == 12 * 3, "biases were zero and are"
    for name in changed:
        assert torch.equal(after[name], before[name.replace("_global", "")])


def test_other_models_weights_are_left_as_they_are(tmp_path):
    AutoModelForMaskedLM.from_config(architecture("BERT", SCALES["tiny"](), VOCABULARY)).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").stat()
    copy_local_to_global(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat() == before


@pytest.mark.parametrize("name", ["BERT", "ALBERT", "Longformer", "BigBird"])
def test_base_is_as_large_as_published(name):
    assert millions(name) == pytest.approx(
        published()["tableB5_params_million_and_peak_memory_MiB_forward_batch1"][name]["params"], abs=5e-4
    )


def test_deberta_and_mabert_differ_from_the_published_counts():
    # no natural configuration gives those; ours are the natural ones
    assert millions("DeBERTa") == pytest.approx(184.424, abs=5e-4)
    assert millions("MaBERT") == pytest.approx(120.164, abs=5e-4)


def millions(name):
    config = architecture(name, SCALES["base"](), longest=PUBLISHED_LONGEST.get(name, 512))
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config).num_parameters() / 1e6


@pytest.mark.parametrize("name", ["MaBERT", *OTHERS])
def test_the_vocabulary_and_the_dropout_are_the_common_ones(name):
    config = architecture(name, SCALES["tiny"](), VOCABULARY)
    assert config.vocab_size == 1000
    assert config.pad_token_id == 0
    dropout = "mlp_dropout" if name == "ModernBERT" else "hidden_dropout_prob"
    assert getattr(config, dropout) == 0.1
    attention = "attention_dropout" if name == "ModernBERT" else "attention_probs_dropout_prob"
    assert getattr(config, attention) == 0.1


@pytest.mark.parametrize("name", ["MaBERT", "BERT", "ALBERT", "Longformer", "BigBird", "DeBERTa", "ModernBERT"])
def test_the_longest_sequence_fits(name):
    config = architecture(name, SCALES["tiny"](), VOCABULARY, longest=96)
    model = AutoModelForMaskedLM.from_config(config).eval()
    ids = torch.randint(5, 1000, (1, 96))
    assert torch.isfinite(model(ids, attention_mask=torch.ones_like(ids)).logits).all()


def test_each_scan_direction_and_convolution_is_there():
    seen = {
        (config.scan_direction, config.conv_mode)
        for config in (architecture(name, SCALES["tiny"](), VOCABULARY) for name in MABERTS)
    }
    assert len(seen) == len(MABERTS) == 8
    ours = architecture("MaBERT", SCALES["tiny"](), VOCABULARY)
    assert (ours.scan_direction, ours.conv_mode) == ("forward", "centered")


def test_rope_replaces_the_learned_positions():
    assert architecture("TTTTTTTTTTTT", SCALES["tiny"]()).position_embedding_type == "absolute"
    assert architecture("TTTTTTTTTTTT+rope", SCALES["tiny"]()).position_embedding_type == "rope"


@pytest.mark.parametrize("name", ["RoBERTa", "MMT", "MMTMMTMMTMMX", "MMTMMTMMTMMT+alibi"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=r"there is no architecture.*MaBERT.*BERT.*patterns of 12 letters"):
        architecture(name, SCALES["tiny"]())
