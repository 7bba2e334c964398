import math

import pytest
import torch
from torch.nn.functional import softplus

from mabert import MaBertConfig, MaBertForMaskedLM, MaBertForSequenceClassification, MaBertModel


def config(**overrides):
    return MaBertConfig.tiny(vocab_size=500, pattern="MT", scan_direction="bidirectional", **overrides)


def check_initial_values(model):
    for name, p in model.named_parameters():
        if "A_log" in name:
            torch.testing.assert_close(p, torch.arange(1.0, 17).log().expand_as(p))
        elif name.endswith(".D") or "norm.weight" in name:
            assert (p == 1).all(), name
        elif "dt_proj.bias" in name:
            steps = softplus(p)
            assert 0.00099 < steps.min() < 0.003, name
            assert 0.03 < steps.max() < 0.101, name
            assert steps.log().median().item() == pytest.approx(math.log(0.01), abs=0.5), name
        elif "dt_proj.weight" in name:
            bound = 8**-0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif "conv1d" in name:
            assert 0.4 < p.abs().max() <= 0.5, name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("model_class", [MaBertModel, MaBertForMaskedLM, MaBertForSequenceClassification])
def test_every_parameter_has_its_initial_value(model_class):
    check_initial_values(model_class(config()))


def test_parameters_missing_from_a_checkpoint_get_theirs_and_loaded_ones_stay(tmp_path):
    saved = MaBertModel(config())
    with torch.no_grad():
        for p in saved.parameters():
            p.fill_(0.25)
    saved.save_pretrained(tmp_path)
    loaded = MaBertForSequenceClassification.from_pretrained(tmp_path)
    for p in loaded.mabert.parameters():
        assert (p == 0.25).all()
    assert loaded.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (loaded.classifier.bias == 0).all()


def test_step_sizes_and_initializer_range_are_obeyed():
    model = MaBertModel(config(time_step_min=0.2, time_step_max=0.3, time_step_floor=0.25, initializer_range=0.1))
    steps = softplus(model.layers[0].mixer.ssms[0].dt_proj.bias).detach()
    assert steps.min() == pytest.approx(0.25, rel=1e-4)
    assert steps.max() <= 0.3001
    assert model.layers[0].mixer.in_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_the_recurrence_is_kept_in_float32_when_a_model_is_loaded_in_bfloat16(tmp_path):
    MaBertModel(config()).save_pretrained(tmp_path)
    model = MaBertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        wide = name.endswith((".A_log", ".D", "dt_proj.bias"))
        assert p.dtype == (torch.float32 if wide else torch.bfloat16), name
    out = model(torch.randint(1, 500, (2, 9))).last_hidden_state
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
