"""Every hybrid learns to recall several facts, at a size at which attention alone does."""

import pytest
import torch

from mabert import HybridConfig, HybridForCausalLM
from mabert.config import FUSIONS
from mabert.data.recall import RecallTask
from mabert.training.recall import EVALUATION_SEED, RecallRun, evaluate_recall, train_recall

TASK = RecallTask(kind="mqar", length=36, pairs=6, vocab_size=40)
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
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        state_size=4,
        mamba_head_size=16,
        pattern=pattern,
        fusion=fusion,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = HybridForCausalLM(config)
    # where attention is the first mixer, no convolution has told a value its key, and copying has to be learnt before;
    # elsewhere it only takes time, of merged attention more than all the rest
    copied, steps = (24, 900) if pattern[0] in "TA" else (0, 600)
    run = RecallRun(copied=copied, lessons=(2, 4), lesson_steps=500, steps=steps, tokens=512, learning_rate=4e-3)
    train_recall(model, [TASK], run)
    assert TASK.guessing(500, EVALUATION_SEED) < 0.6
    assert evaluate_recall(model, TASK, 64).accuracy > 0.95
