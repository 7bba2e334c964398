"""Every hybrid learns to recall several facts from rows by which attention alone does, and the SSM does not."""

import pytest
import torch

from mabert import HybridConfig, HybridForCausalLM
from mabert.config import FUSIONS
from mabert.data.recall import RecallTask
from mabert.training.recall import EVALUATION_SEED, RecallRun, evaluate_recall, train_recall

TASK = RecallTask(kind="mqar", length=36, pairs=6, vocab_size=64)
RUN = RecallRun(
    lessons=(0, 2, 4, 6),
    lesson_steps=(700, 100, 100, 100),
    lesson_tokens=512,
    copied=16,
    steps=200,
    tokens=512,
    learning_rate=3e-3,
)
PATTERNS = {
    "Transformer": ("TTTT", "mean"),
    "sequential": ("SS", "mean"),
    "sequential-attention-first": ("AA", "mean"),
    **{f"parallel-{fusion}": ("PP", fusion) for fusion in FUSIONS},
}


def recalled(pattern: str, fusion: str = "mean") -> float:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    state = {"state_size": 4, "mamba_head_size": 16}
    choices = {"vocab_size": TASK.vocab_size, "initializer_range": 0.1, **sizes, **state}
    model = HybridForCausalLM(HybridConfig(pattern=pattern, fusion=fusion, **choices))
    train_recall(model, [TASK], RUN)
    return evaluate_recall(model, TASK, 64).accuracy


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_a_hybrid_learns_to_recall(name):
    assert recalled(*PATTERNS[name]) > 0.95


@pytest.mark.slow
def test_the_ssm_alone_does_not():
    """By the same rows it is little better than who guesses among a row's values."""
    assert TASK.guessing(500, EVALUATION_SEED) < 0.55
    assert recalled("MMMM") < 0.8
