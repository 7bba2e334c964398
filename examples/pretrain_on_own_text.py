"""Pretrain on your own text from Python: tokenizer, config, run.

python examples/pretrain_on_own_text.py text.txt runs/mine
"""

import sys
from pathlib import Path

from mabert import MaBertConfig
from mabert.data.corpus import iter_documents
from mabert.data.tokenizer import train_tokenizer
from mabert.training.pretrain import PretrainConfig, plan, pretrain


def main(text: str, folder: Path, steps: int = 2000) -> None:
    """Train a tokenizer and a tiny model; a second call goes on where the first one was stopped."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer(iter_documents(text), vocab_size=8000).save_pretrained(tokenizer)
    config = PretrainConfig(
        train=(text,),
        tokenizer=tokenizer,
        output=folder / "model",
        model=MaBertConfig.tiny(),
        steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        bf16=False,
        eval_every=max(1, steps // 10),
    )
    print(f"{plan(config).parameters:,} parameters, {plan(config).tokens:,} tokens")
    result = pretrain(config)
    print(f"held-out loss {result.held_out_loss:.3f}, unigram entropy {result.unigram_entropy:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
