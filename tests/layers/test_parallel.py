"""MaBERT's P layer: attention and Mamba side by side, under every mask and fusion."""

import pytest
import torch

from mabert import MaBertConfig, MaBertModel
from mabert.config import FUSIONS

MASKS = {
    "right": [[1] * 10, [1] * 6 + [0] * 4],
    "left": [[1] * 10, [0] * 4 + [1] * 6],
    "both sides": [[1] * 10, [0] * 2 + [1] * 5 + [0] * 3],
    "interior": [[1, 0] * 5, [1, 1, 0, 0, 1, 1, 1, 0, 1, 1]],
}


def model(fusion, **choices):
    config = MaBertConfig(
        **{"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32, "pattern": "PMP",
           "state_size": 4, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
           "attention_probs_dropout_prob": 0.0, "fusion": fusion} | choices
    )  # fmt: skip
    made = MaBertModel(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


def largest_change(made, mask, poison):
    """How far the real tokens of a padded batch are from those of each row alone."""
    torch.manual_seed(1)
    embeds = torch.randn(2, 10, 24)
    alone = [made(inputs_embeds=embeds[row, mask[row].bool()][None]).last_hidden_state[0] for row in range(2)]
    filled = embeds.masked_fill(mask[..., None] == 0, poison)
    hidden = made(inputs_embeds=filled, attention_mask=mask).last_hidden_state
    return max((hidden[row][mask[row].bool()] - alone[row]).abs().max().item() for row in range(2))


@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_pads_change_nothing_when_packed(fusion, layout):
    assert largest_change(model(fusion), torch.tensor(MASKS[layout]), torch.nan) < 1e-5


@pytest.mark.parametrize("layout", ["right", "left", "both sides"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_pads_change_nothing_under_exact_masks(fusion, layout):
    made = model(fusion, execution="padded")
    assert largest_change(made, torch.tensor(MASKS[layout]), torch.nan) < 1e-5


@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_masks_pads_do_change_something(fusion):
    made = model(fusion, execution="padded", psm="none")
    assert largest_change(made, torch.tensor(MASKS["right"]), 3.0) > 1e-3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_packed_neighbours_change_nothing(fusion):
    made, ids = model(fusion), torch.randint(5, 50, (1, 15))
    seq_idx = torch.tensor([[0] * 6 + [1] * 9])
    hidden = made(ids, seq_idx=seq_idx).last_hidden_state[0]
    for start, end in ((0, 6), (6, 15)):
        torch.testing.assert_close(
            hidden[start:end], made(ids[:, start:end]).last_hidden_state[0], rtol=1e-5, atol=1e-5
        )


def test_every_fusion_is_another_model():
    ids = torch.randint(5, 50, (1, 9))
    outputs = []
    for fusion in FUSIONS:
        torch.manual_seed(0)
        outputs.append(model(fusion)(ids).last_hidden_state)
    for index, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-4 for other in outputs[:index])


def test_directions_count_the_layers_that_scan():
    config = MaBertConfig(pattern="PTMP", scan_direction="alternating")
    assert config.scan_directions() == ["forward", None, "backward", "forward"]
    assert config.layer_types == ["hybrid", "full_attention", "linear_attention", "hybrid"]


def test_gradients_reach_every_parameter_of_every_fusion():
    for fusion in FUSIONS:
        made = model(fusion).train()
        made(torch.randint(5, 50, (2, 9))).last_hidden_state.square().sum().backward()
        unreached = [name for name, parameter in made.named_parameters() if parameter.grad is None]
        assert unreached == [], fusion


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="fusion='sum' is not one of 'mean', 'gate'"):
        MaBertConfig(fusion="sum")


def test_it_is_saved_and_loaded(tmp_path):
    made = model("merge-attention")
    made.save_pretrained(tmp_path)
    ids = torch.randint(5, 50, (1, 9))
    assert torch.equal(MaBertModel.from_pretrained(tmp_path)(ids).last_hidden_state, made(ids).last_hidden_state)
