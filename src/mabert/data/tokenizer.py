"""A WordPiece tokenizer exactly as BERT's: trained, loaded, and told apart by a hash."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000  # CHOICE: rarer characters become [UNK], as in BERT's own vocabularies


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or used; the message says why and what to do."""


def train_tokenizer(
    documents: Iterable[str],
    *,
    vocab_size: int = 30522,
    lowercase: bool = True,
    min_frequency: int = 2,
    model_max_length: int = 512,
    show_progress: bool = False,
) -> BertTokenizer:
    """Train a WordPiece tokenizer on ``documents``, which are read once.

    ``[PAD] [UNK] [CLS] [SEP] [MASK]`` get the ids 0 to 4. The same documents always give the same ids. The vocabulary
    is smaller than ``vocab_size`` where the text holds no more pairs that occur ``min_frequency`` times.
    Raises TokenizerError without text, or where ``vocab_size`` does not even hold the text's characters.
    """
    # CHOICE: BERT's uncased WordPiece, because the paper names no tokenizer
    words = _count_words(documents, lowercase)
    if not words:
        raise TokenizerError("no text to train the tokenizer on: the corpus is empty")
    alphabet, continuations = _alphabet(words)
    needed = len(SPECIAL_TOKENS) + len(alphabet) + len(continuations)
    if vocab_size < needed:
        raise TokenizerError(
            f"vocab_size={vocab_size} is too small: the special tokens and the text's {len(alphabet)} characters, "
            f"at the start of words and within, take {needed}; give at least that"
        )
    # The trainer of `tokenizers` numbers the characters within words ("##e") in the order of a randomly seeded hash
    # table, and breaks ties by these numbers: it gives another vocabulary at every call. Naming them in advance, as
    # special tokens, fixes their numbers; nothing else of that survives, because only the vocabulary is kept.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=show_progress,
    )
    model = Tokenizer(WordPiece(unk_token="[UNK]"))
    model.pre_tokenizer = WhitespaceSplit()
    model.train_from_iterator(_repeat(words), trainer)
    if model.get_vocab_size() < vocab_size:
        logger.info("the text supports %d of the %d tokens asked for", model.get_vocab_size(), vocab_size)
    return BertTokenizer(vocab=model.get_vocab(), do_lower_case=lowercase, model_max_length=model_max_length)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer in ``folder``; a missing one, or one without mask, cls, sep or pad token, is refused."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError(f"{folder} holds no tokenizer (tokenizer.json): train one, or name the folder that has it")
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
    missing = [name for name in ("mask", "cls", "sep", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise TokenizerError(f"the tokenizer in {folder} has no {', '.join(missing)} token, which our models need")
    return tokenizer


def for_generation(tokenizer: PreTrainedTokenizerFast, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a causal model: the same ids, ``[CLS]`` in front of a text and no ``[SEP]`` behind it.

    A text is to be continued, and pads stand on the left. ``[CLS]`` begins a document and ``[SEP]`` ends one. Decoded
    text begins with a space, unless its first token goes on with a word. ``max_length`` is the model's.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    first = tokenizer.cls_token
    backend.post_processor = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, tokenizer.cls_token_id)]
    )
    # a space before every word: the tokens that were generated are decoded without the text in front of them
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^(?!##)"), " "),
            decoders.Replace(Regex("^##"), ""),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,!?])"), ""),
        ]
    )
    names = ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: getattr(tokenizer, name) for name in names},
        bos_token=first,
        eos_token=tokenizer.sep_token,
        padding_side="left",
        model_max_length=max_length or tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a sha256 (64 hex digits) of what decides the token ids: the same before saving and after loading."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    deciding = {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _count_words(documents: Iterable[str], lowercase: bool) -> dict[str, int]:
    """Count the words as the tokenizer will see them, in alphabetical order."""
    normalizer, pre_tokenizer = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
    chunks: Counter[str] = Counter()
    for document in documents:
        chunks.update(normalizer.normalize_str(document).split())
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word, _ in pre_tokenizer.pre_tokenize_str(chunk):
            words[word] += count
    return dict(sorted(words.items()))


def _alphabet(words: dict[str, int]) -> tuple[list[str], list[str]]:
    """Return the most frequent characters, and those of them that occur within words, with their "##"; both sorted."""
    counts: Counter[str] = Counter()
    within: set[str] = set()
    for word, count in words.items():
        for char in word:
            counts[char] += count
        within.update(word[1:])
    alphabet = sorted(sorted(counts, key=lambda char: (-counts[char], char))[:MAX_ALPHABET])
    return alphabet, [f"##{char}" for char in alphabet if char in within]


def _repeat(words: dict[str, int]) -> Iterator[str]:
    """Yield every word as often as it was counted: the trainer takes text, not counts."""
    for word, count in words.items():
        for start in range(0, count, 10_000):
            yield " ".join([word] * min(10_000, count - start))
