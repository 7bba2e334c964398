import json
import shutil

import pytest
import torch
from rich.console import Console
from tiny_pretraining import MODEL, config, losses, write_text
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mabert.training import pretrain as door
from mabert.training.callbacks import read_lines
from mabert.training.pretrain import PretrainConfig, PretrainTrainer, pretrain


@pytest.fixture(scope="module")
def baseline(prepared, shards):
    """The losses of `config` with four steps, two of each length."""
    return short_run(prepared, "baseline")


def short_run(prepared, name, **changes):
    choices = config(prepared, output=name, **{"steps": 4, "stage_fractions": (0.5, 0.5)} | changes)
    pretrain(choices, console=Console(quiet=True))
    return losses(choices.output)


# A whole run


@pytest.fixture(scope="module")
def finished(prepared, shards):
    """A run that is long enough to learn the grammar of the text."""
    choices = config(prepared, output="finished", steps=150, batch_size=16, micro_batch_size=16, learning_rate=2e-2)
    return choices, pretrain(choices, console=Console(quiet=True))


def test_context_is_learnt(finished):
    choices, result = finished
    assert result.held_out_loss < result.unigram_entropy
    assert result.accuracy > 0.3
    assert [held_out.length for held_out in result.held_out] == list(choices.stage_lengths)
    assert result.held_out[0].loss == result.held_out_loss


def test_the_result_is_beside_the_model(finished):
    choices, result = finished
    saved = json.loads((choices.output / "metrics.json").read_text())
    assert saved["held_out_loss"] == result.held_out_loss
    assert result.steps == 150
    assert result.tokens == 16 * (90 * 16 + 60 * 32)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert 0 < result.data_wait < 1
    assert result.environment["torch"] == torch.__version__
    assert json.loads((choices.output / "pretrain_config.json").read_text())["steps"] == 150


def test_the_output_is_a_model_folder(finished):
    choices, result = finished
    model = AutoModelForMaskedLM.from_pretrained(choices.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(choices.output)
    assert sum(parameter.numel() for parameter in model.parameters()) == result.parameters
    batch = tokenizer("the cats [MASK] in the house .", return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[0]
    position = batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    assert tokenizer.decode(logits[position].argmax()) == "are"
    assert sorted(path.name for path in choices.output.iterdir()) == [
        ".lock",
        "checkpoint-100",
        "checkpoint-150",
        "config.json",
        "evaluations.jsonl",
        "log.jsonl",
        "metrics.json",
        "model.safetensors",
        "pretrain_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_finished_run_gives_its_result_at_once(finished, monkeypatch):
    choices, result = finished
    monkeypatch.setattr(door, "PretrainTrainer", None)
    with (console := Console()).capture() as captured:
        assert pretrain(choices, console=console) == result
    assert "is finished already" in captured.get()


def test_the_published_model_is_what_was_measured(finished):
    choices, _ = finished
    last = AutoModelForMaskedLM.from_pretrained(choices.output / "checkpoint-150").state_dict()
    for name, tensor in AutoModelForMaskedLM.from_pretrained(choices.output).state_dict().items():
        assert torch.equal(tensor, last[name])


# Every choice counts


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"batch_size": 4},
        {"stage_lengths": (16, 24)},
        {"stage_fractions": (0.25, 0.75)},
        {"packing": "full-sentences"},
        {"mlm_probability": 0.3},
        {"learning_rate": 1e-3},
        {"warmup_fraction": 0.5},
        {"betas": (0.5, 0.98)},
        {"betas": (0.9, 0.5)},
        {"eps": 1e-2},
        {"weight_decay": 0.9},
        {"max_grad_norm": 1e-3},
        {"bf16": True},
        {"valid_fraction": 0.4},
        {"model": MODEL | {"pattern": "TM"}},
    ],
    ids=str,
)
def test_a_choice_changes_the_losses(prepared, baseline, changes):
    assert short_run(prepared, "-".join(f"{key}={value}" for key, value in changes.items()), **changes) != baseline


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_same_choices_give_the_same_losses_whatever_is_measured_on_the_way(prepared, baseline):
    watched = {"eval_every": 1, "checkpoint_every": 1, "workers": 1, "tensorboard": True, "log_every": 1}
    assert short_run(prepared, "watched", **watched) == baseline
    output = prepared / "watched"
    assert [(line["step"], line["length"]) for line in read_lines(output / "evaluations.jsonl")] == [
        (1, 16),
        (2, 16),
        (3, 16),
        (4, 16),
        (4, 32),
    ]
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-4"]
    assert list(output.glob("runs/*/events.out.tfevents.*"))
    assert not list((prepared / "baseline").glob("runs"))
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]


def test_bf16_keeps_the_weights_in_fp32(prepared):
    short_run(prepared, "half-precision", bf16=True)
    model = AutoModelForMaskedLM.from_pretrained(prepared / "half-precision")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    moments = torch.load(prepared / "half-precision" / "checkpoint-4" / "optimizer.pt")["state"][0]
    assert moments["exp_avg"].dtype == torch.float32


def test_keep_checkpoints(prepared):
    short_run(prepared, "keep", checkpoint_every=1, keep_checkpoints=3)
    assert [path.name[-1] for path in sorted((prepared / "keep").glob("checkpoint-*"))] == ["2", "3", "4"]


def test_eval_rows(prepared):
    short_run(prepared, "few-rows", eval_rows=6)
    short_run(prepared, "more-rows", eval_rows=12)
    few, more = (read_lines(prepared / name / "evaluations.jsonl") for name in ("few-rows", "more-rows"))
    assert 0 < few[0]["labels"] < more[0]["labels"]
    assert 0 < few[1]["labels"] < more[1]["labels"]


def test_held_out_sources_and_the_text_column(prepared, tmp_path):
    write_text(tmp_path / "valid.txt", documents=20, seed=1)
    lines = [json.dumps({"body": text}) for text in (prepared / "text.txt").read_text().split("\n\n")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    choices = {"train": tmp_path / "train.jsonl", "text_column": "body", "valid": tmp_path / "valid.txt"}
    short_run(prepared, str(tmp_path / "run"), shards=None, **choices)
    assert {path.name for path in (tmp_path / "run" / "shards").iterdir()} == {"train", "valid"}


def test_a_budget_of_its_own_decays_to_its_end(prepared):
    short_run(prepared, "own", steps=8, budget=0.5)
    lines = read_lines(prepared / "own" / "log.jsonl")
    assert [line["stage"] for line in lines] == [0, 0, 1, 1]
    assert lines[-1]["learning_rate"] == pytest.approx(3e-3 / 4)  # warm-up 0.4 of a step, the last of 4


def test_a_truncated_budget_stops_the_full_run(prepared):
    full = short_run(prepared, "full", steps=8)
    assert short_run(prepared, "truncated", steps=8, budget=0.5, budget_mode="truncate") == full[:4]


def test_a_run_can_begin_from_a_pretrained_model(prepared, finished):
    choices, _ = finished
    begun = short_run(prepared, "begun", model=None, init_from=choices.output)
    assert begun[0] < 2.0 < short_run(prepared, "scratch")[0]


# One batch, however it is divided


def test_accumulation_changes_no_gradient(prepared, monkeypatch):
    gradients = {}
    for size in (8, 4, 2):
        seen = gradients[size] = []

        def record(self, model, seen=seen):
            seen.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            return torch.tensor(0.0)

        monkeypatch.setattr(PretrainTrainer, "_clip_grad_norm", record)
        model = MODEL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        short_run(prepared, f"accumulate-{size}", micro_batch_size=size, model=model, max_grad_norm=1.0)
    for size in (4, 2):
        for whole, divided in zip(gradients[8][:2], gradients[size][:2], strict=True):
            assert (whole - divided).norm() / whole.norm() < 1e-5


# Runs that go on


def test_going_on_with_other_choices_is_refused_with_their_names(prepared, baseline):
    with pytest.raises(ValueError, match="holds a run with other choices") as raised:
        short_run(prepared, "baseline", learning_rate=0.5, model=MODEL | {"pattern": "MTM"}, workers=1)
    assert "learning_rate was 0.003, is now 0.5" in str(raised.value)
    assert "model.pattern was 'MT', is now 'MTM'" in str(raised.value)
    assert "workers" not in str(raised.value)
    assert "another output folder" in str(raised.value)


def test_going_on_from_another_model_is_refused(prepared, finished, tmp_path):
    start = shutil.copytree(finished[0].output, tmp_path / "start")
    begun = config(prepared, output=tmp_path / "run", model=None, init_from=start)
    begun.output.mkdir()
    begun.save(begun.output)
    begun.check_resumes(begun.output)
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"began with other content of .*model\.safetensors"):
        pretrain(begun, console=Console(quiet=True))


def test_a_run_from_before_an_option_existed_goes_on(prepared, baseline):
    path = prepared / "baseline" / "pretrain_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: saved[name] for name in saved if name not in ("lr_schedule", "min_lr_fraction")}))
    with pytest.raises(ValueError, match="lr_schedule was 'linear', is now 'cosine'"):
        short_run(prepared, "baseline", lr_schedule="cosine")
    assert short_run(prepared, "baseline") == baseline
    assert json.loads(path.read_text()) == saved


def test_what_may_change_does_change_when_a_run_goes_on(prepared, baseline):
    folder = prepared / "half"
    short_run(prepared, "half", checkpoint_every=2)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "metrics.json").unlink()
    choices = {"checkpoint_every": 1, "keep_checkpoints": 3, "eval_every": 1, "micro_batch_size": 8}
    again = short_run(prepared, "half", **choices)
    assert again == pytest.approx(baseline, rel=0.05)
    assert again[:2] == baseline[:2]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [line["step"] for line in read_lines(folder / "evaluations.jsonl")] == [3, 4, 4]
    assert json.loads((folder / "pretrain_config.json").read_text())["micro_batch_size"] == 8


def test_the_output_of_something_else_is_left_alone(tmp_path, prepared):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another model or its checkpoints"):
        short_run(prepared, str(tmp_path))


def test_a_loss_that_explodes_is_reported(prepared):
    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        short_run(prepared, "exploded", steps=8, learning_rate=1e30, max_grad_norm=0, warmup_fraction=0)


# Choices that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0 must be at least 1\."),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 must be at least 1"),
        ({"train": ()}, r"train=\(\) must be one or more sources"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0 must be between 0 and 1"),
        ({"budget": 0.0}, "budget=0.0 must be above 0 and at most 1"),
        ({"budget_mode": "cut"}, "budget_mode='cut' must be one of own, truncate"),
        ({"packing": "pad"}, "packing='pad' must be one of documents, full-sentences"),
        ({"mlm_probability": 0.0}, "mlm_probability=0.0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"stage_lengths": (4, 16)}, r"stage_lengths=\(4, 16\) must be lengths of at least \d+ tokens"),
        ({"stage_lengths": (16,)}, "stage_fractions=.* must give each of stage_lengths"),
        ({"stage_fractions": (0.9, 0.2)}, "add up to 1"),
        ({"batch_size": 9}, "batch_size=9 is not a multiple of micro_batch_size=4"),
        ({"stage_lengths": (16, 1024)}, "exceed max_position_embeddings=512"),
        ({"model": MODEL | {"execution": "padded"}}, "execution='padded' cannot pretrain"),
        ({"model": MODEL | {"vocab_size": 7}}, "model.vocab_size comes from the tokenizer"),
        ({"model": MODEL | {"pattern": "MX"}}, "unknown letter X"),
        ({"init_from": "somewhere"}, "model and init_from exclude each other"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_choices_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_the_defaults_are_the_papers(tmp_path):
    choices = PretrainConfig(train="text.txt", tokenizer="tokenizer", output=tmp_path)
    assert choices.train == ("text.txt",)
    assert choices.model.pattern == "MMTMMTMMTMMT"
    assert choices.steps == 1_000_000
    assert (choices.batch_size, choices.stage_lengths, choices.stage_fractions) == (256, (128, 512), (0.9, 0.1))
    assert (choices.learning_rate, choices.betas, choices.eps, choices.weight_decay) == (6e-4, (0.9, 0.98), 1e-6, 0.01)
    assert round(choices.warmup_fraction * choices.steps) == 24_000
