"""Pretraining recipes. Each returns one complete config; `key=value` on the command line changes any field of it.

    mabert pretrain tiny train=text.txt tokenizer=tokenizer output=runs/tiny

The three smaller ones keep the paper's pattern, stages and objective at sizes for smaller machines. The last three are
causal language models.
"""

from pathlib import Path
from typing import Any

from mabert.causal_config import CausalConfig, HybridConfig, TransMambaConfig
from mabert.config import MaBertConfig
from mabert.training.pretrain_config import PretrainConfig


def tiny(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """Hidden size 128, for a laptop: 21 million tokens.

    Command: mabert pretrain tiny train=text.txt tokenizer=tokenizer output=runs/tiny
    Duration: unmeasured. Expected score: not measured yet.
    """
    return PretrainConfig(
        train=train,
        tokenizer=tokenizer,
        output=output,
        model=MaBertConfig.tiny(),
        steps=4_000,
        batch_size=32,
        micro_batch_size=32,
        # CHOICE: a small model takes a larger step; it passes the unigram entropy in 400k tokens only near 3e-3
        learning_rate=3e-3,
        bf16=False,
        eval_every=500,
        eval_rows=512,
        checkpoint_every=500,
    )


def mini(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """Hidden size 256, for a workstation: 213 million tokens.

    Command: mabert pretrain mini train=text.txt tokenizer=tokenizer output=runs/mini
    Duration: unmeasured. Expected score: not measured yet.
    """
    return PretrainConfig(
        train=train,
        tokenizer=tokenizer,
        output=output,
        model=MaBertConfig.mini(),
        steps=20_000,
        batch_size=64,
        # CHOICE: between tiny's and the paper's
        learning_rate=2e-3,
        eval_every=1_000,
        checkpoint_every=1_000,
    )


def small(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """Hidden size 512, for one GPU: 2.1 thousand million tokens.

    Command: mabert pretrain small train=text/ tokenizer=tokenizer output=runs/small
    Duration: unmeasured. Expected score: not measured yet.
    """
    return PretrainConfig(
        train=train,
        tokenizer=tokenizer,
        output=output,
        model=MaBertConfig.small(),
        steps=100_000,
        batch_size=128,
        micro_batch_size=64,
        # CHOICE: between mini's and the paper's
        learning_rate=1e-3,
    )


def base(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """The paper's: hidden size 768, one million steps of 256 sequences, 43 thousand million tokens.

    Command: mabert pretrain base train=text/ tokenizer=tokenizer output=runs/base
    (budget=0.1, 0.25 and 0.5 give the paper's smaller budgets.)
    Duration: unmeasured. Expected score: not measured yet.
    """
    return PretrainConfig(train=train, tokenizer=tokenizer, output=output)


def transmamba_tiny(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """TransMamba of hidden size 128, for a laptop: 16 million tokens, 1,024 a sequence.

    Command: mabert pretrain transmamba_tiny train=text.txt tokenizer=tokenizer output=runs/transmamba
    Duration: unmeasured. Expected score: not measured yet.
    """
    return _causal_tiny(train, tokenizer, output, TransMambaConfig(num_hidden_layers=8, **CAUSAL_TINY))


def hybrid_tiny(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """Attention and Mamba-2 side by side in four layers, of hidden size 128, for a laptop: 16 million tokens.

    Command: mabert pretrain hybrid_tiny train=text.txt tokenizer=tokenizer output=runs/hybrid model.pattern=MMMTMMMT
    Duration: unmeasured. Expected score: not measured yet.
    """
    model = HybridConfig(pattern="PPPP", mamba_head_size=64, state_size=64, **CAUSAL_TINY)
    return _causal_tiny(train, tokenizer, output, model)


CAUSAL_TINY: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
}


def _causal_tiny(train: tuple[str, ...], tokenizer: Path, output: Path, model: CausalConfig) -> PretrainConfig:
    return PretrainConfig(
        train=train,
        tokenizer=tokenizer,
        output=output,
        model=model,
        steps=2_000,
        batch_size=8,
        micro_batch_size=8,
        stage_lengths=(1024,),
        stage_fractions=(1.0,),
        # CHOICE: TransMamba's schedule at a small model's rate
        learning_rate=2e-3,
        warmup_fraction=0.05,
        lr_schedule="cosine",
        min_lr_fraction=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        bf16=False,
        eval_every=250,
        eval_rows=64,
        checkpoint_every=250,
    )


def transmamba(train: tuple[str, ...], tokenizer: Path, output: Path) -> PretrainConfig:
    """TransMamba with the paper's 24 layers of hidden size 1536, at its 8,192 tokens a sequence.

    Command: mabert pretrain transmamba train=text/ tokenizer=tokenizer output=runs/transmamba
    Duration: unmeasured. Expected score: not measured yet.
    """
    return PretrainConfig(
        train=train,
        tokenizer=tokenizer,
        output=output,
        # PAPER TransMamba: Tables 7 and 8
        model=TransMambaConfig(
            hidden_size=1536,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=8192,
        ),
        steps=9_900,  # 83 thousand million tokens
        batch_size=1024,
        micro_batch_size=2,
        stage_lengths=(8192,),
        stage_fractions=(1.0,),
        learning_rate=2.5e-4,
        # CHOICE: a hundredth of the steps, since the paper names no warm-up
        warmup_fraction=0.01,
        lr_schedule="cosine",
        min_lr_fraction=0.1,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        eval_every=500,
        eval_rows=128,
        checkpoint_every=500,
    )


RECIPES = {recipe.__name__: recipe for recipe in (tiny, mini, small, base, transmamba_tiny, transmamba, hybrid_tiny)}
