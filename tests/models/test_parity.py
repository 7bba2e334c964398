"""The same weights give the same numbers as transformers' own models."""

import pytest
import torch
from transformers import MambaConfig, RobertaPreLayerNormConfig, RobertaPreLayerNormModel
from transformers.models.mamba import modeling_mamba

from mabert import MaBertConfig, MaBertModel
from mabert.layers.mamba import MambaMixer
from mabert.ops import SequenceLayout


def random_parameters(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "A_log" not in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5))
    return module


@pytest.mark.parametrize("execution", ["packed", "padded"])
def test_causal_forward_mixer_equals_mamba_mixer_in_outputs_and_gradients(execution):
    theirs_config = MambaConfig(
        hidden_size=32, state_size=8, num_hidden_layers=1, time_step_rank=4, conv_kernel=4, expand=2, vocab_size=10
    )
    # in eval mode: its training path calls a CUDA kernel and drops the mask
    theirs = random_parameters(modeling_mamba.MambaMixer(theirs_config, layer_idx=0)).eval()
    config = MaBertConfig(
        hidden_size=32, num_attention_heads=2, state_size=8, time_step_rank=4, pattern="M",
        conv_mode="causal", execution=execution, vocab_size=10,
    )  # fmt: skip
    ours = MambaMixer(config, "forward")
    renamed = {
        name if name.startswith(("in_proj", "out_proj")) else f"ssms.0.{name}": p
        for name, p in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)

    x = torch.randn(2, 11, 32)
    weights = torch.randn(2, 11, 32)
    results = []
    for module in (theirs, ours):
        u = x.clone().requires_grad_()
        if module is theirs:
            y = module(u)
        else:
            layout = SequenceLayout.build(2, 11, "cpu", packed=execution == "packed")
            y = module(u.flatten(0, 1), layout).view(2, 11, 32) if layout.packed else module(u, layout)
        gradients = torch.autograd.grad((y * weights).sum(), [u, *module.parameters()])
        names = ["y", "u", *(n.removeprefix("ssms.0.") for n, _ in module.named_parameters())]
        results.append(dict(zip(names, [y, *gradients], strict=True)))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def roberta_weights_as_ours(state):
    """RobertaPreLayerNorm's names to ours, query, key and value stacked."""
    names = {
        "attention.LayerNorm": "mixer_norm",
        "attention.output.dense": "mixer.out_proj",
        "intermediate.LayerNorm": "ffn_norm",
        "intermediate.dense": "ffn.up_proj",
        "output.dense": "ffn.down_proj",
    }
    ours = {
        "norm.weight": state["LayerNorm.weight"],
        "norm.bias": state["LayerNorm.bias"],
        "embeddings.word_embeddings.weight": state["embeddings.word_embeddings.weight"],
        "embeddings.token_type_embeddings.weight": state["embeddings.token_type_embeddings.weight"],
        # RoBERTa's positions begin behind the padding index
        "embeddings.position_embeddings.weight": state["embeddings.position_embeddings.weight"][2:],
        "embeddings.norm.weight": state["embeddings.LayerNorm.weight"],
        "embeddings.norm.bias": state["embeddings.LayerNorm.bias"],
    }
    layers = sorted({key.split(".")[2] for key in state if key.startswith("encoder.layer.")})
    for i in layers:
        prefix = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            qkv = [state[f"{prefix}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"layers.{i}.mixer.qkv_proj.{kind}"] = torch.cat(qkv)
            for theirs, name in names.items():
                ours[f"layers.{i}.{name}.{kind}"] = state[f"{prefix}{theirs}.{kind}"]
    return ours


@pytest.mark.parametrize("execution", ["packed", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pattern_of_t_equals_roberta_prelayernorm(execution, attention):
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "layer_norm_eps": 1e-6,
        "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    theirs = RobertaPreLayerNormModel(
        RobertaPreLayerNormConfig(
            **sizes, num_hidden_layers=3, max_position_embeddings=22, pad_token_id=1, attn_implementation=attention
        ),
        add_pooling_layer=False,
    )
    random_parameters(theirs)
    ours = MaBertModel(
        MaBertConfig(
            **sizes, pattern="TTT", max_position_embeddings=20, execution=execution, attn_implementation=attention
        )
    )
    ours.load_state_dict(roberta_weights_as_ours(theirs.state_dict()))

    ids = torch.randint(2, 50, (3, 17))
    types = torch.randint(0, 2, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    weights = torch.randn(3, 17, 32) * mask[..., None]
    results = []
    for model in (theirs, ours):
        y = model(ids * mask + (1 - mask), attention_mask=mask, token_type_ids=types).last_hidden_state
        gradients = dict(
            zip(
                dict(model.named_parameters()),
                torch.autograd.grad((y * weights).sum(), list(model.parameters()), materialize_grads=True),
                strict=True,
            )
        )
        results.append((y[mask.bool()], roberta_weights_as_ours(gradients) if model is theirs else gradients))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=2e-5)
    for name, expected in results[0][1].items():
        actual = results[1][1][name]
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-4, name
