from dataclasses import fields

import pytest

from mabert import HybridConfig, MaBertConfig, MaBertModel, TransMambaConfig
from mabert.config import CAUSAL_ONLY, CHOICES


@pytest.mark.parametrize(("name", "hidden"), [("base", 768), ("small", 512), ("mini", 256), ("tiny", 128)])
def test_presets_have_the_full_pattern(name, hidden):
    config = getattr(MaBertConfig, name)()
    assert (config.hidden_size, config.pattern, config.num_hidden_layers) == (hidden, "MMTMMTMMTMMT", 12)
    assert config.head_size == 64
    assert config.intermediate_size == 4 * hidden
    assert config.time_step_rank == hidden // 16
    assert getattr(MaBertConfig, name)(vocab_size=99).vocab_size == 99


def test_depth_follows_the_pattern():
    config = MaBertConfig(pattern="TMM")
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["full_attention", "linear_attention", "linear_attention"]


def test_alternating_counts_m_layers_only():
    config = MaBertConfig(pattern="MTMMT", scan_direction="alternating")
    assert config.scan_directions() == ["forward", None, "backward", "forward", None]
    config = MaBertConfig(pattern="MTM", scan_direction="bidirectional")
    assert config.scan_directions() == ["bidirectional", None, "bidirectional"]


def test_saved_and_loaded_configs_are_equal(tmp_path):
    config = MaBertConfig.tiny(pattern="MT", psm="pre", execution="padded", position_embedding_type="rope")
    config.save_pretrained(tmp_path)
    loaded = MaBertConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert MaBertConfig.from_pretrained(tmp_path, psm="none").psm == "none"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "MMX"}, "unknown letter X. Write one letter a layer: M"),
        ({"pattern": ""}, "has no letter"),
        ({"pattern": "MT", "num_hidden_layers": 3}, "num_hidden_layers=3 contradicts pattern 'MT'"),
        ({"hidden_size": 100}, "hidden_size 100 cannot be divided among 12 attention heads"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"conv_kernel": 0}, "conv_kernel must be at least 1"),
        ({"psm": "pre"}, "psm='pre' says what to do with pads.*execution='padded'"),
        ({"pooling": "attention"}, "pooling='attention' says what to do with pads.*execution='padded'"),
        ({"position_embedding_type": "rope", "hidden_size": 36}, "head has 3 of them"),
        (
            {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type 'linear' is not supported",
        ),
        ({"time_step_min": 0.5}, "0 < time_step_min <= time_step_max"),
        ({"pad_token_id": 30522}, "outside the vocabulary"),
        (
            {"sliding_window": 2},
            "sliding_window=2 is a choice of the causal models and would change nothing here. Leave it out, or take "
            "HybridConfig",
        ),
    ],
)
def test_contradictions_are_refused_with_a_message(fields, message):
    with pytest.raises(ValueError, match=message):
        MaBertConfig(**fields)


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}='bogus' is not one of"):
        MaBertConfig(**{name: "bogus"})


@pytest.mark.parametrize("name", CAUSAL_ONLY)
def test_what_only_causal_models_have_is_refused(name):
    config = MaBertConfig.tiny(pattern="M")
    setattr(config, name, 1)
    with pytest.raises(ValueError, match=f"{name}=1 is a choice of the causal models"):
        MaBertModel(config)


def test_none_of_what_only_causal_models_have_is_forgotten():
    theirs = {field.name for config in (HybridConfig, TransMambaConfig) for field in fields(config)}
    ours = {field.name for field in fields(MaBertConfig)} | {"num_hidden_layers"}
    # transformers switches caches off in any config
    assert theirs - ours == {*CAUSAL_ONLY, "use_cache"}


def test_a_contradiction_made_after_construction_is_caught_by_the_model():
    config = MaBertConfig.tiny(pattern="M")
    config.psm = "none"
    with pytest.raises(ValueError, match="psm='none' says what to do with pads"):
        MaBertModel(config)
