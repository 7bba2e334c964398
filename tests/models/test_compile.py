"""The whole model compiles without a graph break, and computes the same."""

import pytest
import torch
from packaging.version import Version

from mabert import MaBertConfig, MaBertForMaskedLM, MaBertForSequenceClassification

MASK = torch.tensor([[1] * 12 + [0] * 8, [0] * 7 + [1] * 13, [1] * 20])
SEQ_IDX = torch.tensor([[0] * 7 + [1] * 13, [0] * 20, [0] * 3 + [1] * 3 + [2] * 14])


def make(model_class, **overrides):
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = MaBertConfig(
        **{"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "pattern": "MT",
           "state_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | overrides
    )  # fmt: skip
    return model_class(config)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor uses it itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("execution", "inputs"),
    [("packed", {"attention_mask": MASK}), ("padded", {"attention_mask": MASK}), ("packed", {"seq_idx": SEQ_IDX})],
    ids=["packed", "padded", "several sequences a row"],
)
def test_training_and_inference_are_one_graph(execution, inputs, backend):
    if "seq_idx" in inputs and Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch 2.11 asks for the number of sequences within its attention, which no graph knows")
    model = make(MaBertForMaskedLM, execution=execution).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.randint(1, 60, (3, 20))
    labels = ids.where((torch.rand(3, 20) < 0.3) & inputs.get("attention_mask", torch.ones(3, 20)).bool(), -100)

    def loss_and_gradients(m):
        loss = m(ids, labels=labels, **inputs).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    for actual, expected in zip(loss_and_gradients(compiled), loss_and_gradients(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    model.eval()
    with torch.no_grad():
        for length in (20, 17):  # a second length makes the length dynamic
            cut = {name: t[:, :length] for name, t in inputs.items()}
            torch.testing.assert_close(compiled(ids[:, :length], **cut).logits, model(ids[:, :length], **cut).logits)


@pytest.mark.parametrize(
    "choices", [{}, *({"pattern": "P", "fusion": name} for name in ("gate", "merge-attention"))], ids=str
)
def test_classification_is_one_graph(choices):
    model = make(MaBertForSequenceClassification, **choices).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(1, 60, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, attention_mask=MASK).logits, model(ids, attention_mask=MASK).logits)
