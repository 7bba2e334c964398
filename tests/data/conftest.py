import pytest
from generated_text import documents, sentences

from mabert.data.shards import build_shards
from mabert.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(sentences(300), vocab_size=150)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(documents(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shards(corpus_file, tokenizer, tmp_path_factory):
    """Sixty documents over several files."""
    return build_shards(corpus_file, tokenizer, tmp_path_factory.mktemp("shards") / "shards", shard_tokens=4000)
