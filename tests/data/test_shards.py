import json
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from generated_text import documents, sentences

from mabert.data.corpus import iter_documents
from mabert.data.shards import Shards, ShardsError, build_shards, prepare_shards, unigram_entropy
from mabert.data.tokenizer import tokenizer_hash, train_tokenizer


def expected_ids(corpus_file, tokenizer):
    texts = list(iter_documents(corpus_file))
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def document(shards, i):
    start, length = int(shards.document_starts[i]), int(shards.document_lengths[i])
    return shards.tokens(start, start + length).tolist()


def test_shards_hold_every_document_token_by_token(shards, corpus_file, tokenizer):
    expected = expected_ids(corpus_file, tokenizer)
    assert shards.n_documents == len(expected) == 60
    assert shards.n_tokens == sum(map(len, expected))
    assert [document(shards, i) for i in range(60)] == expected
    assert len(shards.manifest["shards"]) > 2
    stream = [token for ids in expected for token in ids]
    assert shards.tokens(0, shards.n_tokens).tolist() == stream
    for start, stop in ((0, 0), (3990, 9000), (shards.n_tokens, shards.n_tokens)):
        assert shards.tokens(start, stop).tolist() == stream[start:stop]
    with pytest.raises(IndexError):
        shards.tokens(0, shards.n_tokens + 1)


def test_the_manifest_says_what_they_are(shards, corpus_file, tokenizer):
    manifest = json.loads((shards.folder / "manifest.json").read_text())
    assert manifest["tokenizer_hash"] == shards.tokenizer_hash == tokenizer_hash(tokenizer)
    assert manifest["vocab_size"] == shards.vocab_size == 150
    assert (manifest["documents"], manifest["tokens"]) == (shards.n_documents, shards.n_tokens)
    assert sum(shard["documents"] for shard in manifest["shards"]) == 60
    assert sum(shard["tokens"] for shard in manifest["shards"]) == shards.n_tokens
    assert manifest["sources"][0]["bytes"] == corpus_file.stat().st_size
    assert (shards.cls_token_id, shards.sep_token_id) == (2, 3)


def test_ids_take_two_bytes_or_four(tokenizer, corpus_file, tmp_path, shards):
    assert shards.tokens(0, 1).dtype == np.uint16
    large = pickle.loads(pickle.dumps(tokenizer))
    large.add_tokens([f"token{i}" for i in range(2**16)])
    (tmp_path / "a.txt").write_text("The cat sees token65535.")
    ids = build_shards(tmp_path / "a.txt", large, tmp_path / "shards").tokens(0, 4)
    assert ids.dtype == np.uint32
    assert ids[3] == large.convert_tokens_to_ids("token65535") > 2**16


def test_settings_that_a_call_left_in_the_tokenizer_do_not_matter(tokenizer, corpus_file, tmp_path, shards):
    tokenizer(["a b c"], truncation=True, max_length=4, padding="max_length")
    again = build_shards(corpus_file, tokenizer, tmp_path / "shards")
    assert again.tokens(0, again.n_tokens).tolist() == shards.tokens(0, shards.n_tokens).tolist()


def test_the_names_of_special_tokens_are_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("The cat [SEP] sees [MASK] and [PAD].")
    shards = build_shards(tmp_path / "a.txt", tokenizer, tmp_path / "shards")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & set(shards.tokens(0, shards.n_tokens).tolist())
    assert tokenizer.mask_token_id in tokenizer("The [MASK]")["input_ids"]  # the caller's tokenizer is as it was


def test_unigram_entropy(shards):
    stream = shards.tokens(0, shards.n_tokens)
    assert unigram_entropy(np.array([4, 0, 2, 2])) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    p = np.bincount(stream) / len(stream)
    loss_of_the_best_guess = -np.log(p[stream]).mean()
    assert unigram_entropy(np.bincount(stream, minlength=150)) == pytest.approx(loss_of_the_best_guess)


def test_the_split_parts_whole_documents_and_repeats_itself(shards):
    train, valid = shards.split(0.2, seed=3)
    assert train.n_documents + valid.n_documents == 60
    assert not set(train.document_starts) & set(valid.document_starts)
    assert valid.n_tokens / shards.n_tokens == pytest.approx(0.2, abs=0.03)
    assert train.n_tokens + valid.n_tokens == shards.n_tokens
    assert document(valid, 0) in [document(shards, i) for i in range(60)]
    assert (shards.split(0.2, seed=3)[1].document_starts == valid.document_starts).all()
    assert set(shards.split(0.2, seed=4)[1].document_starts) != set(valid.document_starts)
    assert [part.n_documents for part in shards.split(1e-9, seed=0)] == [59, 1]
    assert [part.n_documents for part in shards.split(1 - 1e-9, seed=0)] == [1, 59]
    assert shards.n_documents == 60


def test_nothing_can_be_held_out_of_one_document(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sees.")
    with pytest.raises(ShardsError, match=r"holds one document: .*an empty line parts documents"):
        build_shards(tmp_path / "a.txt", tokenizer, tmp_path / "shards").split(0.5, seed=0)
    with pytest.raises(ValueError, match=r"valid_fraction=1\.5 must lie between 0 and 1"):
        Shards(tmp_path / "shards").split(1.5, seed=0)


def test_a_pickled_copy_opens_its_own_files(shards):
    shards.tokens(0, 10)
    pickled = pickle.dumps(shards)
    assert len(pickled) < 5000
    assert pickle.loads(pickled).tokens(5, 4500).tolist() == shards.tokens(5, 4500).tolist()


def test_another_tokenizer_is_refused_with_both_hashes(shards, tokenizer):
    other = train_tokenizer(sentences(300), vocab_size=149)
    assert Shards(shards.folder, tokenizer).n_documents == 60
    with pytest.raises(ShardsError) as caught:
        Shards(shards.folder, other)
    for part in (tokenizer_hash(other), tokenizer_hash(tokenizer), "use that tokenizer, or build the shards anew"):
        assert part in str(caught.value)


def test_missing_incomplete_and_damaged_shards_are_refused(shards, tmp_path):
    with pytest.raises(ShardsError, match=r"holds no complete shards \(manifest.json is missing\)"):
        Shards(tmp_path / "nothing")
    for name, harm, message in (
        (
            "tokens-00001.bin",
            lambda path: path.write_bytes(path.read_bytes()[:-2]),
            "tokens-00001.bin has .* bytes, not",
        ),
        ("tokens-00000.bin", lambda path: path.unlink(), "tokens-00000.bin is missing"),
        ("document_offsets.npy", lambda path: path.write_bytes(b""), "document_offsets.npy has 0 bytes"),
        ("manifest.json", lambda path: path.write_text('{"format": 1,'), "manifest.json is damaged"),
        (
            "manifest.json",
            lambda path: path.write_text('{"format": 0}'),
            "has format 0, this version of mabert reads 1",
        ),
    ):
        folder = shutil.copytree(shards.folder, tmp_path / "copy", dirs_exist_ok=True)
        harm(folder / name)
        with pytest.raises(ShardsError, match=message):
            Shards(folder)


def test_prepare_builds_once_and_reuses(corpus_file, tokenizer, tmp_path, caplog):
    (tmp_path / "shards").mkdir()
    first = prepare_shards(corpus_file, tokenizer, tmp_path / "shards")
    built = (tmp_path / "shards" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "mabert"):
        again = prepare_shards(corpus_file, tokenizer, tmp_path / "shards")
    assert f"reusing {tmp_path / 'shards'}: 60 documents" in caplog.text
    assert (tmp_path / "shards" / "manifest.json").stat().st_mtime_ns == built
    assert again.n_tokens == first.n_tokens


def test_prepare_compares_the_content_of_the_sources(corpus_file, tokenizer, tmp_path):
    source = tmp_path / "a.txt"
    shutil.copyfile(corpus_file, source)
    prepare_shards(source, tokenizer, tmp_path / "shards")
    moved = shutil.copyfile(source, tmp_path / "b.txt")  # another name and time, the same text
    assert prepare_shards(moved, tokenizer, tmp_path / "shards").n_documents == 60
    text = source.read_text()
    source.write_text(text.replace("cat", "dog"))  # as many bytes as before
    other = "holds shards of other text .*a.txt.*give another folder"
    with pytest.raises(ShardsError, match=other):
        prepare_shards(source, tokenizer, tmp_path / "shards")
    with pytest.raises(ShardsError, match=other):
        prepare_shards([moved, source], tokenizer, tmp_path / "shards")
    with pytest.raises(ShardsError, match="made with another tokenizer"):
        prepare_shards(moved, train_tokenizer(sentences(300), vocab_size=149), tmp_path / "shards")


def test_prepare_compares_the_address_and_column_of_a_hub_source(tokenizer, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": text, "body": text} for text in documents(5)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare_shards(f"hf://{data}", tokenizer, tmp_path / "shards").n_documents == 5
    assert prepare_shards(f"hf://{data}", tokenizer, tmp_path / "shards").n_documents == 5
    with pytest.raises(ShardsError, match="shards of other text"):
        prepare_shards(f"hf://{data}", tokenizer, tmp_path / "shards", text_column="body")
    with pytest.raises(ShardsError, match="shards of other text"):
        prepare_shards(f"hf://{data}?column=body", tokenizer, tmp_path / "shards")


def test_a_folder_with_something_else_is_left_alone(corpus_file, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ShardsError, match="holds no complete shards"):
        prepare_shards(corpus_file, tokenizer, tmp_path)
    with pytest.raises(FileExistsError):
        build_shards(corpus_file, tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_progress_is_reported_and_a_text_without_tokens_refused(corpus_file, tokenizer, tmp_path):
    (tmp_path / "many.txt").write_text("\n\n".join(documents(3000, longest=30)))
    reports = []
    shards = build_shards(tmp_path / "many.txt", tokenizer, tmp_path / "shards", progress=lambda *r: reports.append(r))
    assert len(reports) > 1
    assert reports == sorted(reports)
    assert reports[-1] == (1.0, shards.n_documents, shards.n_tokens)
    (tmp_path / "control.txt").write_text("\u200b\n")
    with pytest.raises(ShardsError, match=r"finds no token in .*control\.txt"):
        build_shards(tmp_path / "control.txt", tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_kill_leaves_nothing_that_looks_complete(corpus_file, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, time; from mabert.data import shards, tokenizer\n"
        "def wait(*report): print('building', flush=True); time.sleep(60)\n"
        "shards.build_shards(sys.argv[1], tokenizer.load_tokenizer(sys.argv[2]), sys.argv[3], progress=wait)"
    )
    command = [sys.executable, "-c", code, corpus_file, tmp_path / "tokenizer", tmp_path / "shards"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as builder:
        assert builder.stdout.readline() == b"building\n"
        os.kill(builder.pid, signal.SIGKILL)
    assert not (tmp_path / "shards").exists()
    assert prepare_shards(corpus_file, tokenizer, tmp_path / "shards").n_documents == 60
