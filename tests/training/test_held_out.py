import math
from collections import Counter

import pytest
import torch
from tiny_pretraining import MODEL
from torch.nn import functional as F

from mabert.config import MaBertConfig
from mabert.data.mlm import MlmDataset
from mabert.data.rows import Rows
from mabert.data.tokenizer import load_tokenizer
from mabert.models import MaBertForMaskedLM
from mabert.training.held_out import evaluate_held_out


@pytest.fixture
def model(shards):
    torch.manual_seed(0)
    return MaBertForMaskedLM(MaBertConfig(**MODEL, vocab_size=shards.vocab_size))


@pytest.fixture
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


def evaluate(model, dataset, keys, special_ids, **choices):
    return evaluate_held_out(
        model, dataset, keys, special_ids=special_ids, device=torch.device("cpu"), **{"batch_size": 5} | choices
    )


def test_against_one_row_at_a_time(model, shards, tokenizer):
    dataset = MlmDataset([Rows(shards, 32)], tokenizer, seed=0)
    keys = [(0, 0, index) for index in range(12)]
    result = evaluate(model, dataset, keys, tokenizer.all_special_ids)

    losses, hits, words = [], [], Counter()
    model.eval()
    for key in keys:
        sample = dataset[key]
        with torch.no_grad():
            logits = model(sample["input_ids"][None], seq_idx=sample["seq_idx"][None]).logits[0]
        for position, label in enumerate(sample["labels"].tolist()):
            original = sample["input_ids"][position].item() if label == -100 else label
            if original not in tokenizer.all_special_ids:
                words[original] += 1
            if label != -100:
                losses.append(-F.log_softmax(logits[position], -1)[label].item())
                hits.append(logits[position].argmax().item() == label)
    total = words.total()
    entropy = -sum(count / total * math.log(count / total) for count in words.values())
    assert result.labels == len(losses)
    assert result.length == 32
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.accuracy == pytest.approx(sum(hits) / len(hits))
    assert result.unigram_entropy == pytest.approx(entropy, rel=1e-9)


def test_no_batch_size_and_no_repetition_changes_the_result(model, shards, tokenizer):
    dataset = MlmDataset([Rows(shards, 16)], tokenizer, seed=0)
    keys = [(0, 0, index) for index in range(9)]
    results = [evaluate(model, dataset, keys, tokenizer.all_special_ids, batch_size=size) for size in (1, 4, 9, 9)]
    assert results[2] == results[3]
    for result in results:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert (result.labels, result.unigram_entropy) == (results[0].labels, results[0].unigram_entropy)


def test_training_goes_on_as_if_nothing_had_happened(model, shards, tokenizer):
    dataset = MlmDataset([Rows(shards, 16)], tokenizer, seed=0)
    model.train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    keys = [(0, 0, index) for index in range(6)]
    result = evaluate(model, dataset, keys, tokenizer.all_special_ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert evaluate(model.eval(), dataset, keys, tokenizer.all_special_ids) == result  # no dropout
    assert not model.training


def test_a_model_that_knows_frequencies_only_reaches_the_unigram_entropy(model, shards, tokenizer):
    rows = Rows(shards, 32)
    dataset = MlmDataset([rows], tokenizer, seed=0, mlm_probability=0.99)
    keys = [(0, 0, index) for index in range(len(rows))]
    counts = torch.zeros(shards.vocab_size)
    for index in range(len(rows)):
        counts += torch.bincount(torch.from_numpy(rows[index][0]), minlength=len(counts))
    counts[tokenizer.all_special_ids] = 0
    with torch.no_grad():
        model.head.decoder.weight.zero_()
        model.head.decoder.bias.copy_((counts / counts.sum()).clamp_min(1e-30).log())
    result = evaluate(model, dataset, keys, tokenizer.all_special_ids)
    assert result.loss == pytest.approx(result.unigram_entropy, abs=0.01)


def test_nothing_masked_is_an_error(model, shards, tokenizer):
    dataset = MlmDataset([Rows(shards, 16)], tokenizer, seed=0, mlm_probability=1e-9)
    with pytest.raises(ValueError, match="not one token of the 2 held-out rows is to be predicted"):
        evaluate(model, dataset, [(0, 0, 0), (0, 0, 1)], tokenizer.all_special_ids)


def test_a_hopeless_model_has_an_infinite_perplexity(model, shards, tokenizer):
    with torch.no_grad():
        model.head.decoder.weight.zero_()
        model.head.decoder.bias.zero_()[0] = 800.0
    dataset = MlmDataset([Rows(shards, 16)], tokenizer, seed=0)
    result = evaluate(model, dataset, [(0, 0, index) for index in range(6)], tokenizer.all_special_ids)
    assert result.loss == pytest.approx(800)
    assert result.perplexity == math.inf
