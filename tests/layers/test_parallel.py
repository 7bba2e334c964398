"""MaBERT's P layer: attention and Mamba side by side, under every mask and fusion."""

import pytest
import torch
from transformers import AutoModel

from mabert import MaBertConfig, MaBertModel
from mabert.config import FUSIONS
from mabert.layers.padding import PSM
from mabert.ops import SequenceLayout

MASKS = {
    "right": [[1] * 10, [1] * 6 + [0] * 4],
    "left": [[1] * 10, [0] * 4 + [1] * 6],
    "both sides": [[1] * 10, [0] * 2 + [1] * 5 + [0] * 3],
    "interior": [[1, 0] * 5, [1, 1, 0, 0, 1, 1, 1, 0, 1, 1]],
}

MERGED = ["merge-attention", "merge-attention-swapped"]


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


@pytest.mark.parametrize("psm", [psm for psm in PSM if psm != "exact"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_under_every_other_mask_pads_do_change_something(fusion, psm):
    made = model(fusion, execution="padded", psm=psm)
    assert largest_change(made, torch.tensor(MASKS["left"]), 3.0) > 1e-3


# where the SSM's output only asks, what it finds says little of what it is
@pytest.mark.parametrize("fusion", [fusion for fusion in FUSIONS if fusion != "merge-attention-swapped"])
def test_each_mask_is_seen_by_the_tokens(fusion):
    """Behind pads at the beginning: the scan reads them, the second layer's as the first has left them."""
    mask, hidden = torch.tensor(MASKS["left"]), {}
    torch.manual_seed(1)
    embeds = torch.randn(2, 10, 24)
    for psm in PSM:
        made = model(fusion, pattern="PP", execution="padded", psm=psm)
        hidden[psm] = made(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[mask.bool()]
    for one, other in (("none", "pre"), ("none", "post"), ("post", "pre+post"), ("pre+post", "exact")):
        assert (hidden[one] - hidden[other]).abs().max() > 1e-3, (one, other)


@pytest.mark.parametrize("psm", PSM)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_psm_mode_is_its_formula(fusion, psm):
    mask = torch.tensor(MASKS["left"])
    layer = model(fusion, pattern="P", execution="padded", psm=psm).layers[0]
    layout = SequenceLayout.build(2, 10, "cpu", packed=False, attention_mask=mask)
    x, ones = torch.randn(2, 10, 24), torch.ones(2, 10, 1)
    before = mask[..., None] if psm in ("pre", "pre+post", "exact") else ones
    after = mask[..., None] if psm in ("post", "pre+post", "exact") else ones
    y = x + layer.mixer(before * layer.mixer_norm(x), layout)
    y = after * (y + layer.ffn(layer.ffn_norm(y)))
    # at pads too: nothing may be masked that the mode does not mask
    torch.testing.assert_close(layer(x, layout), y)


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


@pytest.mark.parametrize("fusion", MERGED)
def test_merged_attention_reaches_the_whole_sequence(fusion):
    fuse = model(fusion).layers[0].mixer.fusion
    layout = SequenceLayout.build(1, 10, "cpu", packed=True)
    u, a, s = torch.randn(3, 10, 24)
    expected = fuse(u, a, s, layout)
    (a if fuse.swapped else s)[4].neg_()
    moved = (fuse(u, a, s, layout) - expected).abs().amax(dim=-1) > 1e-6
    assert moved.all()
    assert fuse.attention.window is None, "which would act on a GPU alone"


@pytest.mark.parametrize("fusion", MERGED)
def test_merged_attention_drops_weights_in_training_as_attention_does(fusion):
    fuse = model(fusion, attention_probs_dropout_prob=0.5).layers[0].mixer.fusion
    layout = SequenceLayout.build(1, 10, "cpu", packed=True)
    given = torch.randn(3, 10, 24)
    for training in (True, False):
        fuse.train(training)
        assert torch.equal(fuse(*given, layout), fuse(*given, layout)) is not training


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


@pytest.mark.parametrize("fusion", FUSIONS)
def test_it_is_saved_and_loaded(fusion, tmp_path):
    made = model(fusion, pattern="PMT")
    made.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.fusion == fusion
    ids = torch.randint(5, 50, (1, 9))
    assert torch.equal(loaded(ids).last_hidden_state, made(ids).last_hidden_state)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["packed", "padded"])
@pytest.mark.parametrize("direction", ["alternating", "bidirectional"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_gpu_equals_the_cpu(fusion, direction, execution):
    made, mask = model(fusion, execution=execution, scan_direction=direction), torch.tensor(MASKS["right"])
    ids = torch.randint(5, 50, (2, 10))
    expected = made(ids, attention_mask=mask).last_hidden_state
    actual = made.cuda()(ids.cuda(), attention_mask=mask.cuda()).last_hidden_state
    torch.testing.assert_close(actual.cpu()[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_half_precision_is_as_close_packed_as_padded(fusion, dtype, device):
    """Packed on a GPU, attention is torch's own over packed sequences."""
    mask = torch.tensor(MASKS["both sides"], device=device).bool()
    embeds = torch.randn(2, 10, 24, device=device)

    def hidden(execution, half):
        made = model(fusion, execution=execution).to(device)
        with torch.autocast(device, dtype, enabled=half), torch.no_grad():
            return made(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[mask].float()

    exact = hidden("padded", half=False)
    packed, padded = ((hidden(execution, half=True) - exact).norm() for execution in ("packed", "padded"))
    assert 0 < packed <= 2 * padded
