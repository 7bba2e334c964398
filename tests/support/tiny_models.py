"""Tiny model folders with random weights, and generated sentences in their vocabulary."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, PreTrainedTokenizerFast

from mabert import (
    MaBertConfig,
    MaBertForMaskedLM,
    MaBertForSequenceClassification,
    TransMambaConfig,
    TransMambaForCausalLM,
)
from mabert.data.tokenizer import for_generation

NOUNS = ["cat", "dog", "bird", "fish", "horse"]
VERBS = ["sees", "hears", "likes", "finds"]
WORDS = ["the", "a", "not", "un", "##able", "run", "##ning", ".", "?", *NOUNS, *VERBS]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 32}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that knows WORDS."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=32)


def sentence(rng: random.Random) -> str:
    """A sentence of 3 to 12 words."""
    return " ".join(rng.choice(NOUNS + VERBS + ["the", "a"]) for _ in range(rng.randint(3, 12)))


def mabert_config(**changes: Any) -> MaBertConfig:
    """A hybrid of three layers."""
    sizes = TINY | {"pattern": "MTM", "state_size": 4, "vocab_size": len(tiny_tokenizer())}
    return MaBertConfig(**(sizes | changes))


def write_mabert(folder: Path, **changes: Any) -> Path:
    """A MaBertForMaskedLM folder."""
    torch.manual_seed(0)
    return _write(folder, MaBertForMaskedLM(mabert_config(**changes)))


def write_classifier(folder: Path, labels: tuple[str, ...] = ("no", "yes"), **changes: Any) -> Path:
    """A MaBertForSequenceClassification folder; a single label makes it a regression model."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    model = MaBertForSequenceClassification(mabert_config(**(names | changes)))
    model.classifier.weight.data.normal_()
    return _write(folder, model)


def write_bert(folder: Path, **changes: Any) -> Path:
    """A BertForMaskedLM folder."""
    torch.manual_seed(0)
    sizes = TINY | {"num_hidden_layers": 2, "vocab_size": len(tiny_tokenizer())}
    return _write(folder, BertForMaskedLM(BertConfig(**(sizes | changes))))


def write_transmamba(folder: Path, **changes: Any) -> Path:
    """A TransMambaForCausalLM folder with a tokenizer to generate with."""
    torch.manual_seed(0)
    sizes = TINY | {"num_hidden_layers": 2, "vocab_size": len(tiny_tokenizer()), "initializer_range": 0.5}
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    TransMambaForCausalLM(TransMambaConfig(**sizes | ends | changes)).save_pretrained(folder)
    for_generation(tiny_tokenizer()).save_pretrained(folder)
    return folder


def _write(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
