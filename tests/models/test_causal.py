"""The causal models as transformers models: pads, packing, caches, generation, saving, bad input."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    pipeline,
)

from mabert import HybridConfig, HybridForCausalLM, TransMambaConfig, TransMambaForCausalLM
from mabert.causal_config import SSMS, TRANSPOINTS
from mabert.config import FUSIONS
from mabert.layers.attention import Attention
from mabert.layers.causal_attention import CausalSelfAttention
from mabert.layers.mamba1 import Mamba1Mixer
from mabert.layers.mamba2 import Mamba2Mixer
from mabert.models import CausalCache
from mabert.models.causal import MEMORIES
from mabert.ops import SequenceLayout

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CONFIGS = {
    "V9": TransMambaConfig(**SIZES, num_hidden_layers=4),
    "SSM": TransMambaConfig(**SIZES, num_hidden_layers=2, transpoints=[0]),
    "attention": TransMambaConfig(**SIZES, num_hidden_layers=2, transpoints=[64]),
    "early and late": TransMambaConfig(**SIZES, num_hidden_layers=4, transpoints=[1, 3, 6, 11]),
    "hybrid": HybridConfig(**SIZES, pattern="MTM", state_size=8, mamba_head_size=16),
    "T": HybridConfig(**SIZES, pattern="TT"),
    "sequential": HybridConfig(**SIZES, pattern="SA", state_size=8, mamba_head_size=16),
    "Mamba-1": HybridConfig(**SIZES, pattern="MS", state_size=4, ssm="mamba1"),
    "window": HybridConfig(**SIZES, pattern="TMT", state_size=8, mamba_head_size=16, sliding_window=4),
    **{
        f"parallel, {fusion}": HybridConfig(**SIZES, pattern="PP", state_size=8, mamba_head_size=16, fusion=fusion)
        for fusion in FUSIONS
    },
    "parallel, Mamba-1 and window": HybridConfig(
        **SIZES, pattern="PS", state_size=4, ssm="mamba1", sliding_window=4, fusion="gate"
    ),
    "parallel, window": HybridConfig(
        **SIZES, pattern="P", state_size=8, mamba_head_size=16, sliding_window=4, fusion="merge-attention"
    ),
}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICES_AND_BF16 = [("cpu", False), *(pytest.param("cuda", bf16, marks=pytest.mark.gpu) for bf16 in (False, True))]


def model(name):
    config = CONFIGS[name]
    made = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            parameter.normal_(0, 0.3)
            if parameter_name.endswith("A_log"):
                parameter.sub_(2)
    return made.eval()


def ids(batch=3, length=14, seed=1):
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


MASKS = {
    "right": [[1] * 14, [1] * 9 + [0] * 5, [1] * 2 + [0] * 12],
    "left": [[1] * 14, [0] * 5 + [1] * 9, [0] * 12 + [1] * 2],
    "both sides": [[0] + [1] * 12 + [0], [0] * 3 + [1] * 9 + [0] * 2, [0] * 6 + [1] + [0] * 7],
    "interior": [[1, 0] * 7, [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1], [1] * 14],
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", MASKS)
def test_pads_change_nothing(name, layout):
    """Every row's logits are those of the row alone, with whatever the pads hold."""
    lm, mask = model(name), torch.tensor(MASKS[layout])
    batch = ids()
    embeds = lm.get_input_embeddings()(batch).detach()
    embeds[mask == 0] = torch.nan
    logits = lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    assert (logits[mask == 0] == 0).all()
    for row in range(3):
        alone = lm(batch[row, mask[row].bool()][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", MASKS)
def test_pads_change_no_gradient(name, layout):
    mask, batch = torch.tensor(MASKS[layout]), ids()
    together, alone = model(name), model(name)
    embeds = together.get_input_embeddings()(batch).detach()
    embeds[mask == 0] = torch.nan
    weights = torch.randn(3, 14, 60)
    logits = together(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    (logits * weights * mask[..., None]).sum().backward()
    for row in range(3):
        real = mask[row].bool()
        logits = alone(inputs_embeds=embeds[row, real][None], use_cache=False).logits[0]
        (logits * weights[row, real]).sum().backward()
    pairs = [(one.grad, other.grad) for one, other in zip(together.parameters(), alone.parameters(), strict=True)]
    assert all((one is None) == (other is None) for one, other in pairs)
    one, other = (torch.cat([g.flatten() for g in of if g is not None]) for of in zip(*pairs, strict=True))
    assert (one - other).norm() <= 1e-5 * other.norm()
    for one, other in pairs:
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_neighbours_change_nothing(name):
    lm = model(name)
    row, seq_idx = ids(1, 30), torch.tensor([[0] * 13 + [1] + [2] * 11 + [3] * 5])
    logits = lm(row, seq_idx=seq_idx).logits[0]
    for sequence in range(4):
        chosen = seq_idx[0] == sequence
        alone = lm(row[:, chosen], use_cache=False).logits[0]
        torch.testing.assert_close(logits[chosen], alone, rtol=1e-5, atol=1e-5)
    cu = torch.tensor([0, 13, 14, 25, 30], dtype=torch.int32)
    torch.testing.assert_close(lm(row, cu_seq_lens_q=cu).logits[0], logits)


def test_rows_of_transformers_flattening_collator_are_told_apart():
    lm = model("early and late")
    rows = [{"input_ids": row[:length].tolist()} for row, length in zip(ids(), (14, 9, 2), strict=True)]
    batch = DataCollatorWithFlattening(return_seq_idx=True)(rows)
    alone = [lm(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    torch.testing.assert_close(lm(**batch).logits[0], torch.cat(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"DataCollatorWithFlattening\(return_seq_idx=True\)"):
        lm(**DataCollatorWithFlattening()(rows))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_a_later_one(name):
    lm, batch = model(name), ids(1, 14)
    logits = lm(batch, use_cache=False).logits
    changed = batch.clone()
    changed[0, 9:] = (changed[0, 9:] + 7) % 55 + 5
    torch.testing.assert_close(lm(changed, use_cache=False).logits[:, :9], logits[:, :9], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("point", [0, 1, 2, 5, 13, 14, 15, 64])
@pytest.mark.parametrize("layout", ["left", "right", "interior", None])
def test_token_by_token_is_the_parallel_forward(point, layout):
    """For every TransPoint, the convolution's state included, rows of different lengths at once."""
    lm = model("V9")
    lm.config.transpoints = [point, 3]
    batch, mask = ids(), None if layout is None else torch.tensor(MASKS[layout])
    whole = lm(batch, attention_mask=mask, use_cache=False).logits
    cache, columns = None, []
    for t in range(14):
        so_far = None if mask is None else mask[:, : t + 1]
        output = lm(batch[:, t : t + 1], attention_mask=so_far, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        columns.append(output.logits)
    torch.testing.assert_close(torch.cat(columns, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", [(7,), (1, 2), (3, 10, 11)])
def test_several_tokens_at_a_time_are_the_parallel_forward(name, cuts):
    lm, batch, mask = model(name), ids(), torch.tensor(MASKS["left"])
    whole = lm(batch, attention_mask=mask, use_cache=False).logits
    cache, columns = None, []
    for start, end in zip((0, *cuts), (*cuts, 14), strict=True):
        output = lm(batch[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        columns.append(output.logits)
    torch.testing.assert_close(torch.cat(columns, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_is_generation_without_one(name):
    lm, batch, mask = model(name), ids(), torch.tensor(MASKS["left"])
    choices = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = lm.generate(batch, **choices)
    assert torch.equal(with_cache, lm.generate(batch, **choices, use_cache=False))
    for row in range(3):
        alone = lm.generate(batch[row, mask[row].bool()][None], max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert torch.equal(alone[0, -12:], with_cache[row, -12:])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_may_begin_later_and_a_step_may_have_no_token(name):
    lm, batch = model(name), ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]])
    whole = lm(batch, attention_mask=mask, use_cache=False).logits
    cache, columns = None, []
    for t in range(6):
        output = lm(batch[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        columns.append(output.logits)
    torch.testing.assert_close(torch.cat(columns, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_in_half_precision_is_as_good_as_none(name, dtype):
    """Cut into pieces, half precision is as far from single precision as in one piece, by a factor of two."""
    lm, batch, mask = model(name), ids(), torch.tensor(MASKS["left"])
    exact = lm(batch, attention_mask=mask, use_cache=False).logits
    with torch.autocast("cpu", dtype):
        whole = lm(batch, attention_mask=mask, use_cache=False).logits
        cache, columns = None, []
        for start, end in ((0, 4), (4, 5), (5, 11), (11, 14)):
            output = lm(batch[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            columns.append(output.logits)
    error = (whole.float() - exact).abs().max()
    assert error > 0
    assert (torch.cat(columns, dim=1).float() - exact).abs().max() <= 2 * error
    assert error < 0.1 * exact.abs().max()


@pytest.mark.parametrize(("before", "after"), [([3], [20]), ([20], [3])])
def test_a_cache_keeps_to_its_transpoints(before, after):
    lm = model("V9")
    lm.config.transpoints = before
    cache = lm(ids(2, 10)).past_key_values
    lm.config.transpoints = after
    with pytest.raises(ValueError, match=r"transpoints were .* when this cache began and are .* now"):
        lm(ids(2, 1), past_key_values=cache)
    cache.reset()
    lm(ids(2, 1), past_key_values=cache)


def test_transformers_may_ask_the_cache_what_it_likes():
    cache = model("V9")(ids()).past_key_values
    for question in ("is_compileable", "is_initialized", "is_sliding", "is_croppable", "supports_early_init"):
        if hasattr(type(cache), question):
            assert getattr(cache, question) in (False, [False] * 4), question
    assert cache.get_max_length() == -1
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("name", ["early and late", "hybrid"])
def test_a_cache_goes_on_with_the_rows_it_is_told_to(name):
    """Rows of other lengths, each of which is elsewhere in its own sequence."""
    lm, batch, mask = model(name), ids(), torch.tensor(MASKS["left"])
    cache = lm(batch, attention_mask=mask).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 2]))  # the last row, and the second
    new = ids(2, 4, seed=3)
    whole = torch.cat((batch[[2, 1]], new), dim=1)
    whole_mask = torch.cat((mask[[2, 1]], torch.ones_like(new)), dim=1)
    expected = lm(whole, attention_mask=whole_mask, use_cache=False).logits[:, -4:]
    torch.testing.assert_close(lm(new, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["early and late", "hybrid"])
def test_beams_carry_their_memory_along(name):
    lm, batch, mask = model(name), ids(), torch.tensor(MASKS["left"])
    choices = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 3, "eos_token_id": None}
    assert torch.equal(lm.generate(batch, **choices), lm.generate(batch, **choices, use_cache=False))


def test_the_cache_is_constant_in_size_behind_the_last_transpoint():
    lm = model("early and late")
    cache = lm(ids(2, 12)).past_key_values
    size = cache.nbytes
    for _ in range(5):
        cache = lm(ids(2, 1), past_key_values=cache).past_key_values
    assert cache.nbytes == size
    growing = lm(ids(2, 8)).past_key_values
    before = growing.nbytes
    lm(ids(2, 1), past_key_values=growing)
    assert growing.nbytes > before


def test_a_conversation_goes_on_from_its_cache():
    lm, batch = model("early and late"), ids(1, 8)
    first = lm.generate(batch, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    more = torch.cat((first.sequences, ids(1, 3, seed=5)), dim=1)
    again = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(lm.generate(more, past_key_values=first.past_key_values, **again), lm.generate(more, **again))


def test_sampling_several_answers_needs_no_more_than_generate():
    lm = model("early and late")
    torch.manual_seed(0)
    sampled = lm.generate(ids(1, 6), do_sample=True, num_return_sequences=4, max_new_tokens=5, eos_token_id=None)
    assert sampled.shape == (4, 11)


def test_a_head_of_another_kind_is_called():
    """As an adapter's, which does more than multiply with its weight."""

    class Doubled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, x):
            return 2 * self.linear(x)

    lm = model("hybrid")
    lm.set_output_embeddings(Doubled(lm.lm_head))
    evaluated = lm(ids(), labels=ids()).loss
    torch.testing.assert_close(lm.train()(ids(), labels=ids()).loss, evaluated)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_each_next_token_in_its_sequence(name):
    lm, row = model(name), ids(1, 20)
    seq_idx = torch.tensor([[0] * 8 + [1] * 12])
    labels = row.clone()
    labels[0, 5] = -100
    output = lm(row, seq_idx=seq_idx, labels=labels)
    losses = []
    for start, end in ((0, 8), (8, 20)):
        logits = lm(row[:, start:end], use_cache=False).logits[0]
        for t in range(start, end - 1):
            if t + 1 != 5:
                losses.append(torch.nn.functional.cross_entropy(logits[t - start], row[0, t + 1]))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    assert len(losses) == 17
    few = lm(row, seq_idx=seq_idx, labels=labels, labelled_only=True)
    assert few.logits.shape == (17, 60)
    torch.testing.assert_close(few.loss, output.loss)
    training = lm.train()(row, seq_idx=seq_idx, labels=labels)
    assert training.logits is None
    torch.testing.assert_close(training.loss, output.loss)
    expected = torch.autograd.grad(few.loss, list(lm.parameters()), allow_unused=True)
    found = torch.autograd.grad(training.loss, list(lm.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert lm(row, seq_idx=seq_idx, labels=labels, labelled_only=False).logits.shape == (1, 20, 60)
    shared = lm.eval()(row, seq_idx=seq_idx, labels=labels, num_items_in_batch=34)
    torch.testing.assert_close(shared.loss * 2, output.loss)


def test_only_the_last_logits_are_computed_when_asked_for():
    lm, batch, mask = model("V9"), ids(), torch.tensor(MASKS["left"])
    whole = lm(batch, attention_mask=mask).logits
    chosen = lm(batch, attention_mask=mask, logits_to_keep=torch.tensor([2, 13])).logits
    torch.testing.assert_close(chosen, whole[:, [2, 13]])
    kept = lm(batch, attention_mask=mask, logits_to_keep=1).logits
    assert kept.shape == (3, 1, 60)
    torch.testing.assert_close(kept, whole[:, -1:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is not in 5.17
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointed_layers_have_the_same_gradients(name):
    gradients = []
    for checkpointed in (False, True):
        lm = model(name).train()
        if checkpointed:
            lm.gradient_checkpointing_enable()
        lm(ids(), labels=ids()).loss.backward()
        gradients.append({n: p.grad for n, p in lm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_and_a_cache_exclude_each_other():
    lm = model("hybrid").train()
    lm.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Gradient checkpointing reads the tokens twice"):
        lm(ids(), labels=ids(), use_cache=True)
    lm(ids(), labels=ids()).loss.backward()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("V9", {"A_log", "dt_bias"}),
        ("hybrid", {"A_log", "dt_bias", "D"}),
        ("Mamba-1", {"A_log", "bias", "D"}),
        *((f"parallel, {fusion}", {"A_log", "dt_bias", "D"}) for fusion in FUSIONS),
    ],
)
def test_saved_and_loaded_by_the_auto_classes(name, kept, tmp_path):
    lm = model(name)
    lm.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(lm)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(lm.config)
    assert torch.equal(loaded(ids(), use_cache=False).logits, lm(ids(), use_cache=False).logits)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    encoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(ids(), use_cache=False).last_hidden_state, lm.model(ids(), use_cache=False)[0])
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {n.rpartition(".")[2] for n, p in half.named_parameters() if p.dtype == torch.float32} == kept
    assert half(ids(), use_cache=False).logits.isfinite().all()


def test_another_schedule_than_in_training(tmp_path):
    lm = model("V9")
    lm.save_pretrained(tmp_path)
    other = TransMambaForCausalLM.from_pretrained(tmp_path, transpoints="V2")
    assert other.config.layer_transpoints() == [32] * 4
    lm.config.transpoints = [32]
    batch = ids(2, 50)
    assert torch.equal(other(batch, use_cache=False).logits, lm(batch, use_cache=False).logits)
    lm.config.transpoints = "V9"
    assert (lm(batch, use_cache=False).logits != other(batch, use_cache=False).logits).any()


def test_text_generation_pipeline(tmp_path):
    from mabert.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat and the dog sat on the cat"] * 5, vocab_size=60)
    config = TransMambaConfig(**SIZES | {"vocab_size": len(tokenizer)}, num_hidden_layers=2)
    generate = pipeline("text-generation", model=TransMambaForCausalLM(config), tokenizer=tokenizer)
    texts = ["the cat", "the dog sat on the"]
    answers = generate(texts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=True)
    assert all(answer[0]["generated_text"].startswith(text) for answer, text in zip(answers, texts, strict=True))


def test_the_papers_schedules_by_name():
    config = TransMambaConfig(num_hidden_layers=10, max_position_embeddings=8192)
    assert config.layer_transpoints() == [0, 128, 256, 512, 1024, 2048, 4096, 8192, 0, 128]
    assert list(TRANSPOINTS) == [f"V{n}" for n in range(1, 10)]
    assert TransMambaConfig(
        transpoints="V4", num_hidden_layers=4, max_position_embeddings=1024
    ).layer_transpoints() == [
        384,
        512,
        640,
        384,
    ]
    assert TransMambaConfig(transpoints=[7, 0], num_hidden_layers=3).layer_transpoints() == [7, 0, 7]


@pytest.mark.parametrize(
    ("transpoints", "message"),
    [
        ("V10", r"there is no schedule transpoints='V10'\. There are V1, V2"),
        ([], "transpoints is empty: give at least one"),
        ([3, -1], r"transpoints=\[3, -1\]: -1 is no number of tokens, which is at least 0"),
    ],
)
def test_schedules_that_are_none_are_refused(transpoints, message):
    with pytest.raises(ValueError, match=message):
        TransMambaConfig(transpoints=transpoints)
    lm = model("V9")
    lm.config.transpoints = transpoints
    with pytest.raises(ValueError, match=message):
        lm(ids())


@pytest.mark.parametrize("transpoints", [[1.5], [True], ["3"], 7, None])
def test_a_schedule_of_another_type_is_refused(transpoints):
    with pytest.raises(StrictDataclassFieldValidationError, match="transpoints"):
        TransMambaConfig(transpoints=transpoints)


@pytest.mark.parametrize(
    ("kind", "choices", "message"),
    [
        (HybridConfig, {"pattern": "MTX"}, r"pattern 'MTX' has unknown letter X\."),
        (HybridConfig, {"pattern": ""}, "has no letter"),
        (HybridConfig, {"mamba_head_size": 100}, "is no multiple of mamba_head_size 100"),
        (HybridConfig, {"num_hidden_layers": 3}, "contradicts pattern"),
        (HybridConfig, {"state_size": 0}, "state_size must be at least 1"),
        (HybridConfig, {"fusion": "sum"}, "fusion='sum' is not one of 'mean', 'gate', 'merge-attention'"),
        (HybridConfig, {"ssm": "mamba3"}, "ssm='mamba3' is not one of 'mamba2', 'mamba1'"),
        (HybridConfig, {"sliding_window": 0}, "sliding_window must be at least 1 token, or None"),
        (HybridConfig, {"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be at least 0 and below 1, not 1"),
        (HybridConfig, {"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob must be at least 0"),
        (HybridConfig, {"rms_norm_eps": -1.0}, "rms_norm_eps must not be negative, but is -1"),
        (TransMambaConfig, {"initializer_range": float("nan")}, "initializer_range must not be negative, but is nan"),
        (TransMambaConfig, {"time_step_floor": -1.0}, "time_step_floor must not be negative"),
        (TransMambaConfig, {"hidden_act": "sine"}, "hidden_act='sine' is not one of 'gelu', "),
        (TransMambaConfig, {"num_attention_heads": 7}, "no even whole size"),
        (TransMambaConfig, {"hidden_size": 36}, "no even whole size"),
        (TransMambaConfig, {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        (TransMambaConfig, {"time_step_min": 0.0}, "0 < time_step_min"),
        (TransMambaConfig, {"decay_range": (0, 2)}, "two growing numbers above 0"),
        (TransMambaConfig, {"pad_token_id": 99_999}, "outside the vocabulary"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(kind, choices, message):
    with pytest.raises(ValueError, match=message):
        kind(**choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"seq_idx": torch.zeros(3, 14, dtype=torch.long), "use_cache": True},
            "not several sequences or segments in one",
        ),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache, but this model's layers remember"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"cache_params": DynamicCache()}, "cache_params is not supported: give what an earlier output holds"),
        ({"labels": torch.full((3, 14), 60)}, "labels must lie in 0 to 59"),
        ({"labels": torch.ones(3, 13).long()}, r"labels must be integers of shape \(3, 14\).* not .* \(3, 13\)"),
        ({"labels": torch.ones(3, 14)}, r"labels must be integers of shape \(3, 14\).* not torch.float32"),
        ({"position_ids": torch.ones(3, 13).long()}, r"position_ids must have shape \(3, 14\).* not \(3, 13\)"),
        ({"position_ids": torch.arange(14) % 7}, "position_ids begin anew within a row"),
        ({"past_key_values": CausalCache(2)}, "the cache remembers 2 layers, but the model has 4"),
        ({"labels": torch.ones(3, 14).long(), "logits_to_keep": 2}, "leave logits_to_keep out"),
        ({"inputs_embeds": torch.zeros(3, 14, 24)}, "exactly one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(3, 13)}, "attention_mask must have shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model("V9")(ids(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": torch.ones(5).long()},
            r"input_ids must have shape \(B, L\) with at least one token, not \(5,\)",
        ),
        ({"input_ids": torch.ones(2, 0).long()}, r"at least one token, not \(2, 0\)"),
        ({"inputs_embeds": torch.ones(3, 24)}, r"inputs_embeds must have shape \(B, L, H\)"),
    ],
)
def test_tokens_of_no_row_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model("V9")(**arguments)


def test_a_schedule_that_was_spoilt_since_is_refused():
    lm = model("early and late")
    lm.config.transpoints[0] = 1.5
    with pytest.raises(ValueError, match=r"1\.5 is no number of tokens"):
        lm(ids())


def test_a_cache_of_another_batch_is_refused():
    lm = model("V9")
    cache = lm(ids()).past_key_values
    with pytest.raises(ValueError, match="remembers 3 rows, but the batch has 2"):
        lm(ids(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 15\)"):
        lm(ids(3, 1), past_key_values=cache, attention_mask=torch.ones(3, 1))
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(3)
    cache.reset()
    assert isinstance(cache, CausalCache)
    assert torch.equal(lm(ids(2, 4), past_key_values=cache).logits, lm(ids(2, 4)).logits)


def test_initial_values_of_the_recurrence():
    config = TransMambaConfig(num_hidden_layers=1, hidden_size=768, num_attention_heads=384, intermediate_size=8)
    mixer = TransMambaForCausalLM(config).model.layers[0].mixers[0]
    decay, steps = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= decay.min() < 2
    assert 15 < decay.max() <= 16
    assert 0.00099 < steps.min() < 0.002
    assert 0.05 < steps.max() < 0.1001
    hybrid = HybridForCausalLM(HybridConfig(pattern="M", intermediate_size=8)).model.layers[0].mixers[0]
    assert (hybrid.D == 1).all()
    assert (hybrid.norm.weight == 1).all()


@pytest.mark.parametrize("change", [{"ssm": "mamba1"}, {"fusion": "gate"}, {"sliding_window": 3}, {"pattern": "AP"},
                                    {"state_size": 4}, {"expand": 1}, {"mamba_head_size": 24},
                                    {"hidden_act": "relu"}, {"rms_norm_eps": 0.1}, {"conv_kernel": 3},
                                    {"tie_word_embeddings": False}], ids=str)  # fmt: skip
def test_every_option_of_a_hybrid_changes_it(change):
    base = {**SIZES, "pattern": "SP", "state_size": 8, "mamba_head_size": 8, "initializer_range": 0.3}
    outcomes = []
    for choices in (base, base | change):
        torch.manual_seed(0)
        lm = HybridForCausalLM(HybridConfig(**choices)).eval()
        shapes = {n: tuple(p.shape) for n, p in lm.named_parameters()}
        outcomes.append((shapes, lm(ids(), use_cache=False).logits))
    assert outcomes[0][0] != outcomes[1][0] or (outcomes[0][1] - outcomes[1][1]).abs().max() > 1e-4


@pytest.mark.parametrize("change", [{"transpoints": [2, 9]}, {"max_position_embeddings": 32},
                                    {"num_hidden_layers": 3}, {"num_attention_heads": 4}, {"intermediate_size": 40},
                                    {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
                                    {"hidden_dropout_prob": 0.5}, {"attention_probs_dropout_prob": 0.5},
                                    {"initializer_range": 0.2}, {"time_step_min": 0.05}, {"time_step_max": 0.5},
                                    {"time_step_floor": 0.09}, {"decay_range": (4, 5)},
                                    {"hidden_act": "relu"}, {"rms_norm_eps": 0.1}, {"conv_kernel": 3},
                                    {"tie_word_embeddings": False}], ids=str)  # fmt: skip
def test_every_option_of_a_transmamba_changes_it(change):
    outcomes = []
    for choices in ({}, change):
        torch.manual_seed(0)
        base = {**SIZES, "num_hidden_layers": 4, "initializer_range": 0.3, "transpoints": "V9"}
        lm = TransMambaForCausalLM(TransMambaConfig(**base | choices)).train()
        shapes = {n: tuple(p.shape) for n, p in lm.named_parameters()}
        torch.manual_seed(0)
        outcomes.append((shapes, lm(ids(), use_cache=False).logits))
    assert outcomes[0][0] != outcomes[1][0] or (outcomes[0][1] - outcomes[1][1]).abs().max() > 1e-4


def test_a_rank_of_its_own_changes_mamba_1():
    shapes = [
        HybridForCausalLM(HybridConfig(**SIZES, pattern="M", ssm="mamba1", state_size=4, time_step_rank=rank))
        .model.layers[0].mixers[0].dt_proj.weight.shape
        for rank in ("auto", 5)
    ]  # fmt: skip
    assert shapes == [(48, 2), (48, 5)]


@pytest.mark.parametrize(
    ("memories", "letter", "ssm"),
    [("recurrent-only", "T", "mamba2"), ("attention-only", "M", "mamba2"), ("attention-only", "M", "mamba1")],
)
def test_a_probe_lets_nothing_pass_but_what_it_names(memories, letter, ssm):
    """Where the other kind of layer is the only one, the last segment knows nothing of those before."""
    config = HybridConfig(**SIZES, pattern=letter * 2, ssm=ssm, state_size=8, mamba_head_size=16)
    torch.manual_seed(0)
    lm = HybridForCausalLM(config).eval()
    batch, segments = ids(2, 20), torch.tensor([[0] * 8 + [1] * 12] * 2)
    changed = batch.clone()
    changed[:, :8] = (changed[:, :8] + 9) % 50 + 5

    def last(given, **probe):
        return lm(given, use_cache=False, **probe).logits[:, 8:]

    probe = {"segments": segments, "memories": memories}
    torch.testing.assert_close(last(batch, **probe), last(changed, **probe))
    assert (last(batch) - last(changed)).abs().max() > 1e-3
    other = {"segments": segments, "memories": {"T": "attention-only", "M": "recurrent-only"}[letter]}
    torch.testing.assert_close(last(batch, **other), last(batch))


@pytest.mark.parametrize("pattern", ["MT", "TM", "SA", "PP"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("ssm", SSMS)
def test_probes_of_both_memories_together_leave_none(pattern, fusion, ssm):
    choices = {"ssm": ssm, "state_size": 8, "mamba_head_size": 16, "fusion": fusion, "initializer_range": 0.3}
    torch.manual_seed(0)
    lm = HybridForCausalLM(HybridConfig(**SIZES, pattern=pattern, **choices)).eval()
    batch, segments = ids(2, 20), torch.tensor([[0] * 8 + [1] * 7 + [2] * 5] * 2)
    changed = batch.clone()
    changed[:, 8:15] = (changed[:, 8:15] + 9) % 50 + 5

    def last(given, memories):
        return lm(given, segments=segments, memories=memories, use_cache=False).logits[:, 15:]

    torch.testing.assert_close(last(batch, "none"), last(changed, "none"))
    for memories in ("recurrent-only", "attention-only"):
        assert (last(batch, memories) - last(changed, memories)).abs().max() > 1e-4, memories


def leave_tokens_to_themselves(kind, monkeypatch):
    """No mixer of a kind, nor with attention a merged one, hands anything on from one token to another."""
    if kind == "attention":
        monkeypatch.setattr(Attention, "forward", lambda self, qkv, layout: qkv.sum(1))
    else:
        for mixer in (Mamba1Mixer, Mamba2Mixer):
            monkeypatch.setattr(mixer, "forward", lambda self, x, *_: self.in_proj(x)[:, : x.shape[1]])


@pytest.mark.parametrize(("device", "bf16"), DEVICES_AND_BF16)
@pytest.mark.parametrize(("memory", "other"), [("attention", "recurrent"), ("recurrent", "attention")])
@pytest.mark.parametrize("ssm", SSMS)
@pytest.mark.parametrize(("pattern", "fusion"), [("TM", "mean"), ("SA", "mean"), *(("PP", name) for name in FUSIONS)])
def test_a_memory_is_confined_by_the_probe_of_the_other_alone(
    pattern, fusion, ssm, memory, other, device, bf16, monkeypatch
):
    leave_tokens_to_themselves(other, monkeypatch)
    choices = {"ssm": ssm, "state_size": 8, "mamba_head_size": 16, "fusion": fusion, "initializer_range": 0.3}
    torch.manual_seed(0)
    lm = HybridForCausalLM(HybridConfig(**SIZES, pattern=pattern, **choices)).eval().to(device)
    batch, segments = ids(2, 20).to(device), torch.tensor([[0] * 8 + [1] * 7 + [2] * 5] * 2, device=device)
    changed = batch.clone()
    changed[:, 8:15] = (changed[:, 8:15] + 9) % 50 + 5

    def last(given, **probe):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return lm(given, **probe, use_cache=False).logits[:, 15:]

    confining = {"segments": segments, "memories": f"{other}-only"}
    torch.testing.assert_close(last(batch, **confining), last(changed, **confining))
    letting = {"segments": segments, "memories": f"{memory}-only"}
    torch.testing.assert_close(last(batch, **letting), last(batch))
    assert (last(batch) - last(changed)).abs().max() > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fusion", ["merge-attention", "merge-attention-swapped"])
def test_a_window_is_also_that_of_a_merged_attention(fusion, device):
    """Where no branch passes anything on, the fusion's attention alone reaches back, and not beyond its window."""
    choices = {"mamba_head_size": 16, "fusion": fusion, "sliding_window": 4, "initializer_range": 0.3}
    config = HybridConfig(**SIZES, pattern="P", **choices)
    torch.manual_seed(0)
    mixer = HybridForCausalLM(config).eval().to(device).model.layers[0].mixers[0]
    layout = SequenceLayout.build(1, 12, device, packed=True)
    a, s = torch.randn(2, 12, 24).to(device)
    changed = [x.clone() for x in (a, s)]
    for x in changed:
        x[2] += 3
    moved = mixer.fusion(a, a, s, layout) - mixer.fusion(a, *changed, layout)
    assert (moved.abs().amax(dim=-1) > 1e-6).nonzero().flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("letter", ["T", "S", "A", "P"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_window_is_that_of_the_attention_in_every_kind_of_layer(letter, window):
    """Whatever else a layer holds, its attention hands a token on to the others in its window, and to no more."""
    torch.manual_seed(0)
    choices = {"mamba_head_size": 16, "fusion": "mean", "sliding_window": window, "initializer_range": 0.3}
    lm = HybridForCausalLM(HybridConfig(**SIZES, pattern=letter, **choices)).eval()
    (attention,) = (m for m in lm.modules() if isinstance(m, CausalSelfAttention))
    given = []
    attention.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    reached = []
    attention.register_forward_hook(lambda _, args, output: reached.append(output))
    batch, layout = ids(1, 12), SequenceLayout.build(1, 12, "cpu", packed=True)
    lm(batch, use_cache=False)
    changed = given[0].clone()
    changed[2] += 3
    attention(changed, layout)
    moved = (reached[1] - reached[0]).abs().amax(dim=-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(2, 12 if window is None else 6))


class PassesNothingOn(torch.nn.Module):
    """Stands where an SSM does, and leaves every token to itself."""

    def forward(self, u, layout, memory=None):
        return u


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("read", ["alone", "packed", "in pieces", "token by token"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_beside_an_ssm_attention_reaches_its_window_and_no_further(fusion, read, device):
    choices = {"mamba_head_size": 16, "fusion": fusion, "sliding_window": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    lm = HybridForCausalLM(HybridConfig(**SIZES, pattern="P", **choices)).eval()
    lm.model.layers[0].mixers[0].ssm = PassesNothingOn()
    lm.to(device)

    def logits(batch):
        batch = batch.to(device)
        if read == "alone":
            return lm(batch, use_cache=False).logits[0]
        if read == "packed":
            neighbours, seq_idx = ids(1, 5, seed=2).to(device), torch.tensor([[0] * 5 + [1] * 14 + [2] * 5])
            return lm(torch.cat((neighbours, batch, neighbours), dim=1), seq_idx=seq_idx).logits[0, 5:19]
        cache, parts = None, []
        for part in batch.split([3, 1, 6, 4] if read == "in pieces" else 1, dim=1):
            output = lm(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits[0])
        return torch.cat(parts)

    batch, changed = ids(1, 14), ids(1, 14)
    changed[0, 2] = batch[0, 2] % 50 + 6
    moved = (logits(batch) - logits(changed)).abs().amax(dim=-1) > 1e-4
    # swapped, a query finds what attention has gathered within its own window
    reach = 7 if fusion == "merge-attention-swapped" else 4
    assert moved.nonzero().flatten().tolist() == list(range(2, 2 + reach))


def attention_written_out(self, qkv, layout):
    """Causal attention of all tokens of all sequences at once, by a mask of all their pairs."""
    query, key, value = qkv.unbind(1)
    ids_T, index_T = layout.sequence_ids_T, layout.indices_T
    distance = index_T[:, None] - index_T
    seen = (ids_T[:, None] == ids_T) & (distance >= 0) & (distance < (self.window or len(distance)))
    scores = torch.einsum("qkp,mkp->kqm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("kqm,mkp->qkp", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize(("device", "bf16"), DEVICES_AND_BF16)
@pytest.mark.parametrize(
    ("name", "memories"),
    [
        (name, memories)
        for name, config in CONFIGS.items()
        for memories in (MEMORIES if isinstance(config, HybridConfig) else ["both"])
    ],
)
def test_every_device_computes_the_same(name, memories, device, bf16, monkeypatch):
    """Logits and gradients of packed sequences, of which some are in segments, and those of attention written out in
    double precision on a CPU."""
    row, weights = ids(1, 40), torch.randn(1, 40, 60, generator=torch.Generator().manual_seed(0)).double()
    seq_idx = torch.tensor([[0] * 18 + [1] + [2] * 14 + [3] * 7])
    segments = torch.tensor([[0] * 9 + [1] * 6 + [2] * 25])
    probe = {} if memories == "both" else {"segments": segments, "memories": memories}

    def logits_and_gradients(lm, on):
        with torch.autocast(on, torch.bfloat16, enabled=bf16 and lm.dtype == torch.float32):
            logits = lm(row.to(on), seq_idx=seq_idx.to(on), **probe).logits.cpu().double()
        gradients = torch.autograd.grad((logits * weights).mean(), list(lm.parameters()), allow_unused=True)
        return logits, torch.cat([gradient.flatten().cpu().double() for gradient in gradients if gradient is not None])

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", attention_written_out)
        expected = logits_and_gradients(model(name).double(), "cpu")
    for actual, exact in zip(logits_and_gradients(model(name).to(device), device), expected, strict=True):
        assert (actual - exact).norm() < (0.05 if bf16 else 1e-4) * exact.norm()


def test_a_probe_of_one_segment_changes_nothing():
    lm, segments = model("sequential"), torch.zeros(3, 14, dtype=torch.long)
    expected = lm(ids(), use_cache=False).logits
    for memories in ("recurrent-only", "attention-only", "none"):
        torch.testing.assert_close(lm(ids(), segments=segments, memories=memories, use_cache=False).logits, expected)


def test_segments_and_pads_and_packed_sequences_go_together():
    lm, row = model("parallel, merge-attention"), ids(1, 20)
    seq_idx = torch.tensor([[0] * 9 + [1] * 11])
    segments = torch.tensor([[0] * 4 + [1] * 9 + [0] * 7])
    logits = lm(row, seq_idx=seq_idx, segments=segments, memories="recurrent-only").logits[0]
    for start, end in ((0, 9), (9, 20)):
        part = slice(start, end)
        alone = lm(row[:, part], segments=segments[:, part], memories="recurrent-only", use_cache=False).logits[0]
        torch.testing.assert_close(logits[part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memories": "some"}, "memories='some' is not one of 'both', 'recurrent-only'"),
        ({"memories": "none"}, "memories='none' and segments go together"),
        ({"segments": torch.zeros(3, 14)}, "memories='both' and segments go together"),
        ({"segments": torch.zeros(3, 9), "memories": "none"}, r"segments must have shape \(3, 14\)"),
    ],
)
def test_probes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model("hybrid")(ids(), use_cache=False, **arguments)


def test_a_transmamba_cannot_be_probed():
    with pytest.raises(ValueError, match="only hybrids by layer can be probed"):
        model("V9")(ids(), segments=torch.zeros(3, 14), memories="none", use_cache=False)


def test_a_gate_of_one_or_zero_is_one_branch():
    config = HybridConfig(**SIZES, pattern="P", state_size=8, mamba_head_size=16, fusion="gate")
    torch.manual_seed(0)
    mixer = HybridForCausalLM(config).eval().model.layers[0].mixers[0]
    layout = SequenceLayout.build(1, 10, "cpu", packed=True)
    u = torch.randn(10, 24)
    for value, branch in ((1e4, mixer.attention), (-1e4, mixer.ssm)):
        torch.nn.init.zeros_(mixer.fusion.gate.weight)
        torch.nn.init.constant_(mixer.fusion.gate.bias, value)
        torch.testing.assert_close(mixer(u, layout), branch(u, layout))


def test_fusions_are_their_formulas():
    torch.manual_seed(0)
    layout = SequenceLayout.build(1, 7, "cpu", packed=True)
    u, a, s = torch.randn(3, 7, 24)

    def norm(x):
        return torch.nn.functional.rms_norm(x, (24,), eps=1e-6)

    def fused(name):
        config = HybridConfig(**SIZES, pattern="P", state_size=8, mamba_head_size=16, fusion=name)
        fusion = HybridForCausalLM(config).eval().model.layers[0].mixers[0].fusion
        with torch.no_grad():
            for parameter_name, parameter in fusion.named_parameters():
                if "norm" not in parameter_name:
                    parameter.normal_()
        return fusion, fusion(u, a, s, layout)

    torch.testing.assert_close(fused("mean")[1], (norm(s) + norm(a)) / 2)
    fusion, y = fused("scaled")
    expected = fusion.proj(fusion.attention_scale * norm(a) + fusion.ssm_scale * norm(s))
    torch.testing.assert_close(y, expected)
    fusion, y = fused("concat")
    torch.testing.assert_close(y, torch.cat((norm(a), norm(s)), -1) @ fusion.proj.weight.T)
    fusion, y = fused("gate")
    g = torch.sigmoid(u @ fusion.gate.weight.T + fusion.gate.bias)
    torch.testing.assert_close(y, g * a + (1 - g) * s, rtol=1e-5, atol=1e-5)
    for name, asking, asked in (("merge-attention", a, s), ("merge-attention-swapped", s, a)):
        fusion, y = fused(name)
        query = (norm(asking) @ fusion.query_proj.weight.T).view(7, 3, 8)
        key, value = (norm(asked) @ fusion.key_value_proj.weight.T).view(7, 2, 3, 8).unbind(1)
        scores = torch.einsum("qkp,mkp->kqm", query, key) / 8**0.5
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        merged = torch.einsum("kqm,mkp->qkp", scores.softmax(-1), value).flatten(1)
        torch.testing.assert_close(y, merged @ fusion.out_proj.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("letter", "mixers"),
    [("S", [Mamba2Mixer, CausalSelfAttention]), ("A", [CausalSelfAttention, Mamba2Mixer])],
)
def test_both_in_one_layer_come_in_their_order(letter, mixers):
    """x += first(N(x)); x += second(N(x)); x += FFN(N(x)), written out."""
    torch.manual_seed(0)
    config = HybridConfig(**SIZES, pattern=letter, state_size=8, mamba_head_size=16, initializer_range=0.2)
    (layer,) = HybridForCausalLM(config).eval().model.layers
    assert [type(mixer) for mixer in layer.mixers] == mixers
    x, layout = torch.randn(9, 24), SequenceLayout.build(1, 9, "cpu", packed=True)
    with torch.no_grad():
        between = x + layer.mixers[0](layer.mixer_norms[0](x), layout)
        between = between + layer.mixers[1](layer.mixer_norms[1](between), layout)
        expected = between + layer.ffn(layer.ffn_norm(between))
        torch.testing.assert_close(layer(x, layout), expected)
