import shutil

import pytest
import torch
from tiny_models import write_bert
from tiny_pretraining import LENGTHS, MODEL, config

from mabert.config import MaBertConfig
from mabert.data.rows import Rows
from mabert.data.shards import ShardsError, prepare_shards
from mabert.data.tokenizer import load_tokenizer, train_tokenizer
from mabert.inference.loading import ModelFolderError
from mabert.models import MaBertForMaskedLM, MaBertForSequenceClassification
from mabert.training.plan import estimate, plan, prepare_rows
from mabert.training.pretrain import pretrain


def test_what_a_run_will_do(prepared, shards):
    planned = plan(config(prepared))
    assert planned.schedule.stage_steps == (6, 4)
    assert planned.layout.accumulation == 2
    assert planned.stage_tokens == (6 * 8 * 16, 4 * 8 * 32)
    assert planned.tokens == 6 * 8 * 16 + 4 * 8 * 32
    model = MaBertForMaskedLM(MaBertConfig(**MODEL, vocab_size=shards.vocab_size))
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.model.vocab_size == shards.vocab_size
    train, held_out = shards.split(0.2, 0)
    assert planned.rows == tuple(len(Rows(train, length)) for length in LENGTHS)
    assert planned.held_out_rows == tuple(len(Rows(held_out, length)) for length in LENGTHS)
    assert planned.epochs == (48 / planned.rows[0], 32 / planned.rows[1])


@pytest.mark.parametrize(("step", "left"), [(0, 14), (5, 9), (6, 8), (8, 4), (10, 0)])
def test_tokens_left(prepared, step, left):
    assert plan(config(prepared)).tokens_from(step) == left * 8 * 16


def test_a_plan_tokenises_nothing_and_leaves_nothing(prepared, tmp_path):
    planned = plan(config(prepared, output=str(tmp_path / "run"), shards=tmp_path / "shards"))
    assert planned.rows is planned.held_out_rows is planned.epochs is None
    assert list(tmp_path.iterdir()) == []


def test_several_processes_share_the_batch(prepared, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    layout = plan(config(prepared)).layout
    assert (layout.accumulation, layout.world_size, layout.rank) == (1, 2, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="micro_batch_size=4 times 3 processes"):
        plan(config(prepared))


def test_too_little_text_for_a_row(prepared, shards):
    with pytest.raises(ValueError, match=r"the held-out text is too short: .* do not fill one row of 512"):
        plan(config(prepared, stage_lengths=(16, 512), valid_fraction=0.02))


def test_shards_of_another_tokenizer_or_text_are_refused(prepared, shards, tmp_path):
    other = train_tokenizer(["some other words altogether"], vocab_size=40, min_frequency=1)
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ShardsError, match="made with another tokenizer"):
        plan(config(prepared, tokenizer=tmp_path / "tokenizer"))
    (tmp_path / "other.txt").write_text("the cat is in the house .")
    with pytest.raises(ShardsError, match="holds shards of other text"):
        plan(config(prepared, train=tmp_path / "other.txt"))


def test_two_processes_that_tokenise_at_once_share_the_shards_of_the_quicker_one(prepared, tmp_path):
    choices = config(prepared, shards=tmp_path / "shards")
    tokenizer = load_tokenizer(choices.tokenizer)
    built = []

    def be_quicker(*_):
        if not built:
            built.append(prepare_shards(choices.train, tokenizer, tmp_path / "shards" / "train"))
            built.append((tmp_path / "shards" / "train" / "manifest.json").stat().st_ino)

    train, _ = prepare_rows(choices, tokenizer, be_quicker)
    assert len(train[0]) > 0
    assert (tmp_path / "shards" / "train" / "manifest.json").stat().st_ino == built[1]
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["train"]


def test_a_model_to_start_from_brings_its_architecture(prepared, shards, tmp_path):
    start = MaBertConfig(**MODEL | {"pattern": "TTM"}, vocab_size=shards.vocab_size, max_position_embeddings=40)
    MaBertForMaskedLM(start).save_pretrained(tmp_path / "start")
    planned = plan(config(prepared, model=None, init_from=tmp_path / "start"))
    assert planned.model.pattern == "TTM"
    with pytest.raises(ValueError, match="exceed max_position_embeddings=40"):
        plan(config(prepared, model=None, init_from=tmp_path / "start", stage_lengths=(16, 48)))
    shutil.rmtree(tmp_path / "start")
    start.vocab_size += 1
    MaBertForMaskedLM(start).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="give the tokenizer that the model was trained with"):
        plan(config(prepared, model=None, init_from=tmp_path / "start"))


def test_what_is_no_masked_language_model_or_would_mix_sequences_is_no_start(prepared, shards, tmp_path):
    with pytest.raises(ModelFolderError, match="is not a model folder, it does not exist"):
        plan(config(prepared, model=None, init_from=tmp_path / "nothing"))
    write_bert(tmp_path / "bert", vocab_size=shards.vocab_size)
    with pytest.raises(ValueError, match=r"several sequences in a row, which a bert model would mix\. Take"):
        plan(config(prepared, model=None, init_from=tmp_path / "bert"))
    classifier = MaBertForSequenceClassification(MaBertConfig(**MODEL, vocab_size=shards.vocab_size))
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelFolderError, match="holds no trained MaBertForMaskedLM"):
        pretrain(config(prepared, output=str(tmp_path / "run"), model=None, init_from=tmp_path / "classifier"))


def test_a_torch_that_could_use_a_gpu_measures_on_the_cpu_without_one(prepared, shards, monkeypatch):
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: None if check_available else torch.device("cuda"),
    )
    assert estimate(plan(config(prepared))).seconds > 0


def test_the_estimate_counts_bytes_and_seconds(prepared, shards):
    planned = plan(config(prepared))
    measured = estimate(planned)
    assert measured.weights == measured.gradients == 4 * planned.parameters
    assert measured.optimizer == 8 * planned.parameters
    # At least the input of each Linear of both layers' feed-forward networks, at the longer stage.
    assert measured.activations > 2 * 4 * 32 * (16 + 32) * 4
    assert measured.memory == 16 * planned.parameters + measured.activations
    assert measured.seconds == pytest.approx(6 * measured.step_seconds[0] + 4 * measured.step_seconds[1])
    assert min(measured.step_seconds) > 0
    half = estimate(plan(config(prepared, micro_batch_size=2)))
    assert half.activations == pytest.approx(measured.activations / 2, rel=0.03)


def test_the_estimate_runs_two_sequences_and_extrapolates_to_the_micro_batch(prepared, shards, monkeypatch):
    planned = plan(config(prepared, micro_batch_size=8))
    sizes, original = [], MaBertForMaskedLM.forward

    def watch(self, input_ids, **inputs):
        sizes.append(len(input_ids))
        return original(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(MaBertForMaskedLM, "forward", watch)
    extrapolated = estimate(planned)
    assert set(sizes) == {2}
    monkeypatch.setattr("mabert.training.plan.MEASURED_SEQUENCES", 8)
    whole = estimate(planned)
    assert set(sizes) == {2, 8}
    assert extrapolated.activations == pytest.approx(whole.activations, rel=0.15)
