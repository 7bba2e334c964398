import json
import logging
import random

import pytest
from generated_text import sentences
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from mabert.data import tokenizer as tokenizer_module
from mabert.data.tokenizer import TokenizerError, load_tokenizer, tokenizer_hash, train_tokenizer


def test_it_is_berts_wordpiece(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokenizer) == 150
    assert tokenizer.model_max_length == 512
    encoded = tokenizer("The CAT sees", "a Moon, naïve 漢")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["[CLS]", "the", "cat", "sees", "[SEP]", "a", "moon", ",", "naive", "[UNK]", "[SEP]"]
    assert encoded["token_type_ids"] == [0] * 5 + [1] * 6
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "the cat sees a moon, naive"


def test_words_are_parted_as_the_reference_bert_tokenizer_does(tokenizer):
    reference = BertTokenizer(vocab=tokenizer.get_vocab())
    text = "Every river's 1st cat-door\u00a0re-measures\ttwo letters… [MASK] 漢字"
    assert tokenizer(text).data == reference(text).data
    assert any(token.startswith("##") for token in tokenizer.tokenize(text))


def test_case_is_kept_on_request():
    cased = train_tokenizer(sentences(300), vocab_size=200, lowercase=False)
    tokens = cased.tokenize("The naïve cat")
    assert tokens[0][0] == "T"
    assert "ï" in "".join(tokens)


def test_min_frequency_and_a_small_text_limit_the_vocabulary(caplog):
    with caplog.at_level(logging.INFO, "mabert"):
        small = train_tokenizer(["abc abc abd xyz"], vocab_size=1000)
    assert f"the text supports {len(small)} of the 1000 tokens asked for" in caplog.text
    assert "abc" in small.get_vocab()
    assert "xyz" not in small.get_vocab()
    assert "xyz" in train_tokenizer(["abc abc abd xyz"], vocab_size=1000, min_frequency=1).get_vocab()


def test_rare_characters_beyond_the_alphabet_are_unknown(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_ALPHABET", 3)
    small = train_tokenizer(["aaa bbb cc d"], vocab_size=100)
    assert small.tokenize("ab c d") == ["a", "##b", "c", "[UNK]"]


def test_the_same_text_always_gives_the_same_ids():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(2000)]
    hashes = {tokenizer_hash(train_tokenizer([" ".join(words)], vocab_size=400)) for _ in range(4)}
    assert len(hashes) == 1


def test_saving_and_loading_keeps_it_also_beside_a_config(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mabert"}))
    text = ("The cat sees", "the naïve question.")
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(*text).data == tokenizer(*text).data
        assert loaded.model_max_length == 512
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert not list(tmp_path.glob("*.txt"))  # one tokenizer, not two forms of it


def test_the_hash_tells_what_decides_the_ids(tokenizer):
    known = tokenizer_hash(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=8)  # leaves settings behind
    assert tokenizer_hash(tokenizer) == known
    vocab = tokenizer.get_vocab()
    assert tokenizer_hash(BertTokenizer(vocab=vocab)) == known
    assert tokenizer_hash(BertTokenizer(vocab=vocab, do_lower_case=False)) != known
    swapped = {**vocab, "cat": vocab["moon"], "moon": vocab["cat"]}
    assert swapped != vocab
    assert tokenizer_hash(BertTokenizer(vocab=swapped)) != known


def test_no_text_and_too_small_a_vocabulary_are_refused():
    with pytest.raises(TokenizerError, match="no text to train the tokenizer on"):
        train_tokenizer([" \n", ""])
    # a b c at the start of words, ##b ##c within, and five special tokens
    with pytest.raises(TokenizerError, match=r"vocab_size=9 is too small: .* 3 characters, .* take 10"):
        train_tokenizer(["abc ab c"], vocab_size=9)
    assert len(train_tokenizer(["abc ab c"], vocab_size=10)) == 10


def test_a_missing_or_unfit_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match=r"holds no tokenizer \(tokenizer\.json\)"):
        load_tokenizer(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="has no mask token, which our models need"):
        load_tokenizer(tmp_path)
