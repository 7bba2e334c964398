"""Causal models go through the same pretraining: packed rows, held-out loss, a folder to generate from."""

import pytest
import torch
from rich.console import Console
from tiny_pretraining import LENGTHS, TRANSMAMBA, config
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, pipeline

from mabert import HybridConfig, TransMambaConfig, TransMambaForCausalLM
from mabert.data.mlm import collate_rows
from mabert.data.next_token import NextTokenDataset
from mabert.data.rows import Rows
from mabert.data.tokenizer import for_generation, load_tokenizer
from mabert.experiments.recipes.pretrain import RECIPES
from mabert.training.held_out import evaluate_held_out
from mabert.training.objectives import MASKED, NEXT_TOKEN, labelled_logits, objective_of, takes_seq_idx
from mabert.training.pretrain import PretrainConfig, estimate, plan, pretrain

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(prepared, shards):
    choices = {"steps": 60, "learning_rate": 1e-2, "eval_every": 20, "packing": "documents"}
    return pretrain(config(prepared, output="causal", model=TRANSMAMBA, **choices), console=QUIET)


def test_context_is_learnt(finished):
    assert finished.held_out_loss < 0.8 * finished.unigram_entropy
    assert [held.length for held in finished.held_out] == list(LENGTHS)
    assert finished.accuracy > 0.2


def test_the_published_model_remembers_what_it_reads(finished):
    model = AutoModelForCausalLM.from_pretrained(finished.output)
    assert model.config.use_cache is True
    assert model(torch.tensor([[2, 7]])).past_key_values.get_seq_length() == 2
    assert AutoTokenizer.from_pretrained(finished.output).model_max_length == 32


def test_the_output_generates_text(finished):
    generate = pipeline("text-generation", model=str(finished.output))
    assert isinstance(generate.model, TransMambaForCausalLM)
    assert generate.model.config.layer_transpoints() == [0, 5, 32]
    tokenizer = generate.tokenizer
    assert tokenizer("the cat").input_ids[0] == tokenizer.bos_token_id == generate.model.config.bos_token_id
    assert tokenizer("the cat").input_ids[-1] != tokenizer.sep_token_id
    assert generate.model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.sep_token_id
    (answer,) = generate("the cat", max_new_tokens=6, do_sample=False)
    words = answer["generated_text"].split()
    assert words[:2] == ["the", "cat"]
    assert words[2] == "is", "the verb agrees"


def test_a_pipeline_takes_texts_of_different_lengths(finished):
    generate = pipeline("text-generation", model=str(finished.output))
    texts = ["the cat", "the dogs are in the house . the bird", "the"]
    together = generate(texts, max_new_tokens=5, do_sample=False, batch_size=3)
    alone = [generate(text, max_new_tokens=5, do_sample=False) for text in texts]
    assert [t[0]["generated_text"] for t in together] == [a[0]["generated_text"] for a in alone]


def test_labels_are_the_tokens_but_for_the_first_of_each_sequence(prepared, shards):
    rows = Rows(shards, 32, "documents")
    dataset = NextTokenDataset([rows])
    assert len(dataset) == len(rows)
    several = 0
    for index in range(len(rows)):
        sample = dataset[(0, 3, index)]
        ids, seq_idx = rows[index]
        begins = [0, *(i for i in range(1, 32) if seq_idx[i] != seq_idx[i - 1])]
        several += len(begins) > 1
        assert sample["input_ids"].tolist() == ids.tolist()
        expected = [-100 if i in begins else token for i, token in enumerate(ids.tolist())]
        assert sample["labels"].tolist() == expected
    assert several


@pytest.mark.parametrize("packing", ["documents", "full-sentences"])
def test_the_held_out_loss_is_that_of_every_labelled_token(prepared, shards, packing):
    dataset = NextTokenDataset([Rows(shards, 32, packing)])
    model = TransMambaForCausalLM(TransMambaConfig(**TRANSMAMBA | {"vocab_size": 100})).eval()
    keys = [(0, 0, index) for index in range(5)]
    found = evaluate_held_out(
        model, dataset, keys, batch_size=2, special_ids=[0, 1, 2, 3, 4], device=torch.device("cpu")
    )
    batch = collate_rows([dataset[key] for key in keys])
    with torch.no_grad():
        output = model(**batch)
    assert found.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert found.labels == int((batch["labels"] != -100).sum())
    labels = batch["labels"][batch["labels"] != -100]
    bound = evaluate_held_out(
        model, dataset, keys, batch_size=2, special_ids=None, device=torch.device("cpu")
    ).unigram_entropy
    shares = torch.bincount(labels).double() / len(labels)
    assert bound == pytest.approx(float(-(shares * shares.clamp(min=1e-30).log()).sum()))


def test_a_model_without_a_longest_sequence_is_trained_as_well(prepared, shards):
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    made = config(prepared, output="mamba", model=mamba, packing="full-sentences", steps=1)
    assert pretrain(made, console=QUIET).steps == 1


def test_other_causal_models_take_rows_of_one_sequence(prepared, shards, tmp_path):
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, max_position_embeddings=32)
    with pytest.raises(ValueError, match=r"a gpt2 model would mix\. Take packing='full-sentences'"):
        config(prepared, output="gpt2", model=gpt2, packing="documents")
    result = pretrain(
        config(prepared, output="gpt2", model=gpt2, packing="full-sentences", steps=40, learning_rate=1e-2),
        console=QUIET,
    )
    assert result.held_out_loss < result.unigram_entropy
    model = AutoModelForCausalLM.from_pretrained(result.output).eval()
    ids = torch.randint(5, 70, (2, 16))
    labels = ids.where(torch.arange(16) % 3 != 0, -100)
    with torch.no_grad():
        expected = model(ids).logits[:, :-1][labels[:, 1:] != -100]
        given = labelled_logits(model, {"input_ids": ids, "seq_idx": torch.zeros_like(ids)}, labels)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    ("made", "objective", "apart"),
    [
        (TransMambaConfig(), NEXT_TOKEN, True),
        (HybridConfig(), NEXT_TOKEN, True),
        (GPT2Config(), NEXT_TOKEN, False),
    ],
)
def test_what_a_model_is_trained_for(made, objective, apart):
    assert objective_of(made) is objective
    assert not objective.is_masked
    assert MASKED.is_masked
    assert takes_seq_idx(made) == apart


def test_a_masking_rate_says_nothing_to_a_causal_model(tmp_path):
    with pytest.raises(ValueError, match="mlm_probability says nothing to a causal transmamba model"):
        PretrainConfig(train="t", tokenizer=tmp_path, output=tmp_path, model=TRANSMAMBA, mlm_probability=0.3)


def test_the_learning_rate_can_fall_by_a_cosine(prepared, shards):
    from mabert.training.callbacks import read_lines

    rates = {}
    for name, changes in {
        "linear": {},
        "cosine": {"lr_schedule": "cosine"},
        "cosine-to-a-tenth": {"lr_schedule": "cosine", "min_lr_fraction": 0.1},
    }.items():
        result = pretrain(config(prepared, output=name, model=TRANSMAMBA, **changes), console=QUIET)
        rates[name] = [line["learning_rate"] / 3e-3 for line in read_lines(result.output / "log.jsonl")]
    warm_up, steps = 1, 10
    for step in range(steps):
        progress = (step - warm_up) / (steps - warm_up)
        if step >= warm_up:
            half = (1 + torch.cos(torch.tensor(progress * torch.pi))) / 2
            assert rates["linear"][step] == pytest.approx(1 - progress, abs=1e-6)
            assert rates["cosine"][step] == pytest.approx(float(half), abs=1e-6)
            assert rates["cosine-to-a-tenth"][step] == pytest.approx(0.1 + 0.9 * float(half), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_schedule": "sine"}, "lr_schedule='sine' must be one of linear, cosine"),
        ({"min_lr_fraction": 1.0, "lr_schedule": "cosine"}, "min_lr_fraction=1.0 must be at least 0 and below 1"),
        ({"min_lr_fraction": 0.1}, "has no effect on lr_schedule='linear'"),
    ],
)
def test_schedules_that_are_none_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(train="t", tokenizer=tmp_path, output=tmp_path, **changes)


def test_plan_and_estimate(prepared, shards):
    planned = plan(config(prepared, output="planned", model=TRANSMAMBA))
    assert planned.model.bos_token_id == load_tokenizer(prepared / "tokenizer").cls_token_id
    assert planned.parameters > 0
    measured = estimate(planned)
    assert measured.activations > 0


@pytest.mark.parametrize("name", ["transmamba_tiny", "transmamba"])
def test_recipes_of_transmamba(name, prepared, tmp_path):
    made = RECIPES[name](train=(str(prepared / "text.txt"),), tokenizer=prepared / "tokenizer", output=tmp_path)
    assert isinstance(made.model, TransMambaConfig)
    assert made.model.transpoints == "V9"
    assert max(made.stage_lengths) == made.model.max_position_embeddings


def test_a_tokenizer_for_generation_has_the_same_ids_and_is_kept(prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for_generation(tokenizer).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat is in the house."
    assert again(text).input_ids == tokenizer(text).input_ids[:-1]
    assert again.padding_side == "left"
    assert (again.bos_token, again.eos_token, again.pad_token) == ("[CLS]", "[SEP]", "[PAD]")
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == " the cat is in the house."
    assert again.decode(again("cat").input_ids[1:]) == " cat"
    pieces = ["h", "##ou", "##s", "is", "."]
    assert again.backend_tokenizer.decoder.decode(pieces) == " hous is."
    assert again.backend_tokenizer.decoder.decode(pieces[1:]) == "ous is."
    assert set(again(["a cat", "cat"], padding=True)) == {"input_ids", "attention_mask"}
