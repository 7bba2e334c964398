import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mabert import MaBertConfig, MaBertForMaskedLM, MlmCollator
from mabert.data.mlm import MlmDataset, collate_rows, mask_tokens, permuted_index
from mabert.data.rows import Rows

SPECIAL = torch.arange(5)
MASK = 4


@pytest.fixture(scope="module")
def stages(shards):
    return [Rows(shards, 32), Rows(shards, 64)]


def masked(ids, p=0.15, seed=0):
    return mask_tokens(
        ids,
        ids >= 5,
        mask_token_id=MASK,
        replacements=np.arange(5, 100),
        mlm_probability=p,
        rng=np.random.default_rng(seed),
    )


@pytest.mark.parametrize("p", [0.15, 0.4, 1.0])
def test_eighty_ten_ten(p):
    ids = np.random.default_rng(1).integers(0, 1000, (400, 500))
    input_ids, labels = masked(ids, p)
    selected = labels != -100
    n = (ids >= 5).sum()
    assert selected.sum() / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert not selected[ids < 5].any()
    assert (labels[selected] == ids[selected]).all()
    assert (input_ids[~selected] == ids[~selected]).all()
    became = input_ids[selected]
    assert (became == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (became == ids[selected]).mean() == pytest.approx(0.1, abs=0.02)
    put_in = became[(became != MASK) & (became != ids[selected])]
    counts = np.bincount(put_in)
    assert counts[:5].sum() == 0
    assert len(counts) == 100
    assert np.abs(counts[5:] - counts[5:].mean()).max() < 5 * counts[5:].mean() ** 0.5


def test_a_row_may_have_no_label():
    input_ids, labels = masked(np.array([2, 7, 3]), p=1e-9)
    assert input_ids.tolist() == [2, 7, 3]
    assert labels.tolist() == [-100] * 3


def test_samples_keep_the_row_and_never_touch_special_tokens(stages, tokenizer):
    dataset = MlmDataset(stages, tokenizer, seed=0, mlm_probability=0.5)
    assert len(dataset) == len(stages[0]) + len(stages[1])
    for stage, length in enumerate((32, 64)):
        for index in range(len(stages[stage])):
            sample = dataset[stage, 0, index]
            ids, seq_idx = stages[stage][index]
            assert {name: (value.shape, value.dtype) for name, value in sample.items()} == {
                "input_ids": ((length,), torch.int64),
                "seq_idx": ((length,), torch.int32),
                "labels": ((length,), torch.int64),
            }
            selected = sample["labels"] != -100
            original = torch.where(selected, sample["labels"], sample["input_ids"])
            assert (original == torch.from_numpy(ids)).all()
            assert (sample["seq_idx"] == torch.from_numpy(seq_idx)).all()
            assert not torch.isin(sample["labels"][selected], SPECIAL).any()
            assert torch.isin(sample["input_ids"][selected], SPECIAL[:4]).sum() == 0


def test_masks_depend_on_seed_stage_epoch_and_index_alone(stages, tokenizer):
    one = MlmDataset([stages[0], stages[0]], tokenizer, seed=7, mlm_probability=0.5)
    two = pickle.loads(pickle.dumps(MlmDataset([stages[0], stages[0]], tokenizer, seed=7, mlm_probability=0.5)))
    forward = [one[0, 1, i]["labels"] for i in range(20)]
    backward = [two[0, 1, i]["labels"] for i in reversed(range(20))]
    assert torch.equal(torch.stack(forward), torch.stack(backward[::-1]))
    here = one[0, 1, 3]["labels"] == -100
    others = [one[0, 2, 3], one[1, 1, 3], MlmDataset(stages, tokenizer, seed=8, mlm_probability=0.5)[0, 1, 3]]
    assert not any(torch.equal(other["labels"] == -100, here) for other in others)
    assert not torch.equal(one[0, 1, 4]["labels"] == -100, here)


def test_workers_change_nothing(stages, tokenizer):
    dataset = MlmDataset(stages, tokenizer, seed=0)
    batches = [[(0, 0, 3), (0, 0, 1)], [(0, 1, 3), (0, 1, 0)], [(1, 0, 2), (1, 0, 4)]]
    alone, two = (
        list(DataLoader(dataset, batch_sampler=batches, num_workers=n, collate_fn=collate_rows)) for n in (0, 2)
    )
    for a, b in zip(alone, two, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert alone[2]["seq_idx"].shape == (2, 64)


def test_permuted_index_is_a_permutation_for_every_epoch():
    first = permuted_index(3, 0, 0, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert (permuted_index(3, 0, 0, 1000) == first).all()
    for other in ((4, 0, 0), (3, 1, 0), (3, 0, 1)):
        assert (permuted_index(*other, 1000) == first).mean() < 0.02


def test_an_impossible_probability_is_refused(stages, tokenizer):
    for p in (0, 1.5):
        with pytest.raises(ValueError, match="must be over 0 and at most 1"):
            MlmDataset(stages, tokenizer, seed=0, mlm_probability=p)


def examples(tokenizer, n=24):
    texts = [("the cat sees the moon. " * (1 + i % 4)).strip() for i in range(n)]
    return [dict(tokenizer(text, return_special_tokens_mask=True)) for text in texts]


def test_the_collator_pads_and_masks_real_tokens_only(tokenizer):
    rows = examples(tokenizer)
    batch = MlmCollator(tokenizer, 0.5, seed=1)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    expected = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    selected = batch["labels"] != -100
    assert torch.equal(torch.where(selected, batch["labels"], batch["input_ids"]), expected["input_ids"])
    assert not selected[expected["attention_mask"] == 0].any()
    assert not torch.isin(expected["input_ids"][selected], SPECIAL).any()
    ordinary = ~torch.isin(expected["input_ids"], SPECIAL)
    assert selected.sum() / ordinary.sum() == pytest.approx(0.5, abs=0.1)


def test_tokens_that_the_attention_mask_hides_are_not_selected(tokenizer):
    row = dict(tokenizer("the cat sees the moon. " * 4))
    row["attention_mask"] = [0] * 10 + row["attention_mask"][10:]
    labels = MlmCollator(tokenizer, 1.0)([row])["labels"][0]
    assert (labels[:10] == -100).all()
    assert (labels[10:-1] != -100).all()


def test_the_collator_repeats_itself_by_its_seed_and_varies_by_batch(tokenizer):
    rows = examples(tokenizer)
    one, two = MlmCollator(tokenizer, seed=1), MlmCollator(tokenizer, seed=1)
    first, second = one(rows)["labels"], one(rows)["labels"]
    assert torch.equal(first, two(rows)["labels"])
    assert not torch.equal(first, second)
    assert not torch.equal(first, MlmCollator(tokenizer, seed=2)(rows)["labels"])


def test_the_collator_varies_by_worker_and_epoch_and_repeats_by_torchs_seed(tokenizer):
    loader = DataLoader(examples(tokenizer, 1) * 8, batch_size=4, num_workers=2, collate_fn=MlmCollator(tokenizer, 0.5))
    torch.manual_seed(0)
    one, two, three, four = (batch["labels"] for _ in range(2) for batch in loader)
    assert not any(torch.equal(one, other) for other in (two, three, four))
    torch.manual_seed(0)
    assert torch.equal(next(iter(loader))["labels"], one)


def test_a_plain_trainer_takes_the_collator(tokenizer, tmp_path):
    config = MaBertConfig(
        vocab_size=len(tokenizer), hidden_size=16, pattern="MT", num_attention_heads=2, intermediate_size=32
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True
    )
    model = MaBertForMaskedLM(config)
    before = model.get_input_embeddings().weight.clone()
    result = Trainer(model, args, MlmCollator(tokenizer), Dataset.from_list(examples(tokenizer))).train()
    assert 0 < result.training_loss < 2 * np.log(len(tokenizer))
    assert not torch.equal(model.get_input_embeddings().weight, before)
