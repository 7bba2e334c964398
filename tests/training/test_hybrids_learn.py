"""Every hybrid learns to recall several facts, at a size at which attention alone does."""

import pytest
import torch

from mabert import HybridConfig, HybridForCausalLM
from mabert.config import FUSIONS
from mabert.data.recall import RecallTask
from mabert.training.recall import EVALUATION_SEED, RecallRun, evaluate_recall, train_recall

TASK = RecallTask(kind="mqar", length=48, pairs=6, vocab_size=48)
PATTERNS = {
    "Transformer": ("TTTT", "mean"),
    "sequential": ("SS", "mean"),
    "sequential-attention-first": ("AA", "mean"),
    **{f"parallel-{fusion}": ("PP", fusion) for fusion in FUSIONS},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_a_model_learns_to_recall(name):
    pattern, fusion = PATTERNS[name]
    config = HybridConfig(
        vocab_size=TASK.vocab_size,
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=96,
        state_size=4,
        mamba_head_size=16,
        pattern=pattern,
        fusion=fusion,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = HybridForCausalLM(config)
    run = RecallRun(copied=32, lessons=(2, 4, 6), lesson_steps=700, steps=1_200, tokens=1_024, learning_rate=3e-3)
    train_recall(model, [TASK], run)
    assert TASK.guessing(500, EVALUATION_SEED) < 0.5
    assert evaluate_recall(model, TASK, 64).accuracy > 0.95
