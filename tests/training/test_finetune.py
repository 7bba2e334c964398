import io
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny_finetuning
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer, write_bert, write_classifier, write_mabert
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mabert import MaBertForSequenceClassification
from mabert.experiments.architectures import BASELINES, Vocabulary, architecture
from mabert.experiments.scales import SCALES
from mabert.inference.loading import ModelFolderError
from mabert.inference.predict import predict
from mabert.training import batches, finetune_scores
from mabert.training import finetune as door
from mabert.training.callbacks import TrainingInterruptedError
from mabert.training.finetune import FinetuneTrainer, estimate_finetune, finetune, plan_finetune, read_result
from mabert.training.finetune_scores import BestEpoch


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_finetuning.prepare(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def learned(prepared):
    """A run that is long enough to learn the task."""
    changes = {"max_train_rows": None, "epochs": 4, "test": prepared / "dev.tsv"}
    return finetune(tiny_finetuning.config(prepared, prepared / "learned", **changes))


@pytest.fixture(scope="module")
def short(prepared):
    """A run of three steps."""
    return finetune(tiny_finetuning.config(prepared, prepared / "short"))


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output):
    return load_file(output / "model.safetensors")


def same_weights(a, b):
    return all(torch.equal(weight, weights(b)[name]) for name, weight in weights(a).items())


def predictions(output, split="dev"):
    header, *lines = (output / f"predictions-{split}.tsv").read_text().splitlines()
    return header.split("\t"), [line.split("\t") for line in lines]


# What a run leaves


def test_it_learns_what_the_majority_class_does_not_know(learned):
    dev = learned.splits["dev"]
    assert dev.rows == 80
    assert dev.majority["accuracy"] < 0.7
    assert dev.metrics["accuracy"] > 0.95
    assert list(dev.metrics) == ["accuracy", "mcc"]
    assert learned.splits["test"] == dev
    assert (learned.train_rows, learned.steps) == (400, 50)


def test_the_folder_holds_the_model_and_nothing_half_done(learned):
    assert sorted(path.name for path in learned.output.iterdir()) == [
        ".lock",
        "config.json",
        "finetune_config.json",
        "log.jsonl",
        "metrics.json",
        "model.safetensors",
        "predictions-dev.tsv",
        "predictions-test.tsv",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = AutoModelForSequenceClassification.from_pretrained(learned.output).config
    assert config.id2label == {0: "cat", 1: "other"}
    assert config.label2id == {"cat": 0, "other": 1}
    assert not hasattr(config, "use_cache")
    assert read_result(learned.output) == learned
    assert learned.config["learning_rate"] == 5e-3
    assert learned.environment["torch"] == torch.__version__


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"select": "best"}])
def test_the_saved_model_makes_the_saved_predictions(prepared, learned, tmp_path, changes):
    if changes:
        learned = finetune(tiny_finetuning.config(prepared, tmp_path, **changes))
    header, lines = predictions(learned.output)
    assert header == ["index", "gold", "predicted", "p(cat)", "p(other)"]
    texts = [first for first, _ in tiny_finetuning.rows(80, seed=1)]
    again = predict(texts, model_folder=learned.output)
    for index, (text, line, prediction) in enumerate(zip(texts, lines, again, strict=True)):
        assert line[:3] == [str(index), tiny_finetuning.has_cat(text), prediction.label]
        assert [float(score) for score in line[3:]] == pytest.approx(list(prediction.scores.values()), abs=2e-6)
    right = sum(line[1] == line[2] for line in lines)
    assert learned.splits["dev"].metrics["accuracy"] == pytest.approx(right / 80)


def test_the_pipeline_takes_the_folder(learned):
    model = AutoModelForSequenceClassification.from_pretrained(learned.output)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(learned.output))
    assert classify("the cat sees a dog")[0]["label"] == "cat"
    assert classify("the horse sees a dog")[0]["label"] == "other"


def test_every_step_is_logged_with_the_schedule_and_its_tokens(prepared, learned):
    records = [json.loads(line) for line in (learned.output / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 51))
    assert [record["stage"] for record in records][::12] == [0, 0, 1, 2, 3]
    rates = [record["learning_rate"] for record in records]
    assert rates[0] == 0.0
    assert rates[5] == 5e-3 == max(rates)
    assert rates[-1] == pytest.approx(5e-3 / 45)
    lengths = [len(first.split()) + 2 for first, _ in tiny_finetuning.rows(400, seed=0)]
    assert sum(record["tokens"] for record in records) == 4 * sum(lengths)
    assert learned.seconds == pytest.approx(sum(record["seconds"] for record in records))


def test_the_summary_says_what_to_hold_a_score_against(prepared, tmp_path):
    glue = tiny_finetuning.write_glue(tmp_path / "glue")
    printed = Console(file=io.StringIO(), width=200)
    config = tiny_finetuning.config(prepared, tmp_path / "run", task="MNLI", glue=glue, max_length=12)
    result = finetune(config, console=printed)
    assert list(result.splits) == ["dev_matched", "dev_mismatched"]
    text = printed.file.getvalue()
    for name, split in result.splits.items():
        assert (
            f"MNLI {name} (subset, 24 rows; train subset, 24 rows): accuracy {split.metrics['accuracy']:.4f} "
            "(majority class 0.3333)"
        ) in text
        assert f"{name}: {split.truncated} of 24 rows are cut to 12 tokens" in text
        assert predictions(result.output, name)[0][3:] == ["p(entailment)", "p(neutral)", "p(contradiction)"]
    assert "train: " in text
    assert "step 1 of 1: epoch 1, loss" in text


# Determinism


def test_the_same_seed_gives_the_same_run_and_another_seed_another(prepared, short, tmp_path):
    again = finetune(tiny_finetuning.config(prepared, tmp_path / "again"))
    assert losses(again.output) == losses(short.output)
    assert same_weights(again.output, short.output)
    assert predictions(again.output) == predictions(short.output)
    other = finetune(tiny_finetuning.config(prepared, tmp_path / "other", seed=1))
    assert losses(other.output) != losses(short.output)


def test_workers_change_nothing(prepared, short, tmp_path):
    loaded = finetune(tiny_finetuning.config(prepared, tmp_path, workers=1))
    assert losses(loaded.output) == losses(short.output)


@pytest.mark.parametrize("model", ["mabert", "bert"])
@pytest.mark.parametrize("regression", [False, True])
def test_accumulated_micro_batches_are_the_batch(prepared, tmp_path, model, regression):
    write = {"mabert": write_mabert, "bert": write_bert}[model]
    changes = {
        "model": write(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "label_column": "cats" if regression else "label",
        "regression": regression,
        "max_train_rows": 80,  # batches of 32, 32 and 32, the last one filled from the next epoch
    }
    whole = finetune(tiny_finetuning.config(prepared, tmp_path / "whole", **changes))
    parts = finetune(tiny_finetuning.config(prepared, tmp_path / "parts", micro_batch_size=4, **changes))
    assert len(losses(whole.output)) == 3
    assert losses(parts.output) == pytest.approx(losses(whole.output), rel=1e-5)
    for name, weight in weights(whole.output).items():
        torch.testing.assert_close(weights(parts.output)[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-3},
        {"warmup_fraction": 0.5},
        {"weight_decay": 1.0},
        {"max_grad_norm": 0.1},
        {"bf16": True},
        {"max_length": 8},
        {"epochs": 2},
        {"batch_size": 16},
        {"max_train_rows": 64},
        {"text_column": "second"},
        {"text_pair_column": "second"},
        {"pooling": "cls"},
        {"pooling": "mean"},
        {"execution": "padded", "psm": "none"},
        {"execution": "padded", "pooling": "attention"},
        {"select": "best"},
        {"dev": None, "max_train_rows": 400},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_each_choice_changes_the_run(prepared, short, tmp_path, changes):
    changed = finetune(tiny_finetuning.config(prepared, tmp_path, **changes))
    assert not all(
        weight.shape == weights(short.output)[name].shape and torch.equal(weight, weights(short.output)[name])
        for name, weight in weights(changed.output).items()
    )


def test_exact_masking_in_padded_execution_trains_as_packed_execution(prepared, short, tmp_path):
    changes = {"model": write_mabert(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)}
    packed = finetune(tiny_finetuning.config(prepared, tmp_path / "packed", **changes))
    padded = finetune(tiny_finetuning.config(prepared, tmp_path / "padded", execution="padded", **changes))
    assert losses(padded.output) == pytest.approx(losses(packed.output), rel=1e-4)
    config = AutoModelForSequenceClassification.from_pretrained(padded.output).config
    assert (config.execution, config.psm, config.pooling) == ("padded", "exact", "map")


# Tasks and models


def test_the_second_text_of_a_pair_is_read(prepared, tmp_path):
    for name, seed in (("train", 0), ("dev", 1)):
        tiny_finetuning.write_table(tmp_path / f"{name}.tsv", 400, seed, of="second")
    changes = {"train": tmp_path / "train.tsv", "dev": tmp_path / "dev.tsv", "max_train_rows": None, "epochs": 4}
    pairs = finetune(tiny_finetuning.config(prepared, tmp_path / "pairs", text_pair_column="second", **changes))
    blind = finetune(tiny_finetuning.config(prepared, tmp_path / "blind", **changes))
    assert pairs.splits["dev"].metrics["accuracy"] > 0.9
    assert blind.splits["dev"].metrics["accuracy"] < 0.7


def test_regression_learns_numbers(prepared, tmp_path):
    changes = {"label_column": "cats", "regression": True, "max_train_rows": None, "epochs": 4}
    result = finetune(tiny_finetuning.config(prepared, tmp_path, **changes))
    dev = result.splits["dev"]
    assert dev.majority == {}
    assert list(dev.metrics) == ["pearson", "spearman"]
    assert dev.metrics["pearson"] > 0.5
    header, lines = predictions(tmp_path)
    assert header == ["index", "gold", "predicted"]
    gold, predicted = np.array([[float(value) for value in line[1:]] for line in lines]).T
    assert set(gold) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert np.corrcoef(gold, predicted)[0, 1] == pytest.approx(dev.metrics["pearson"])
    assert predict(["the cat"], model_folder=tmp_path)[0].scores == {}


def test_other_encoders_go_through_the_same_door(prepared, tmp_path):
    bert = write_bert(tmp_path / "bert")
    changes = {"model": bert, "max_train_rows": None, "epochs": 4}
    result = finetune(tiny_finetuning.config(prepared, tmp_path / "run", **changes))
    assert result.splits["dev"].metrics["accuracy"] > 0.75
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.model_type == "bert"
    with pytest.raises(ModelFolderError, match=r"the bert model in .* has no setting psm"):
        finetune(tiny_finetuning.config(prepared, tmp_path / "psm", model=bert, psm="pre"))


@pytest.mark.parametrize(
    ("labels", "is_kept"),
    [(("cat", "other"), True), (("other", "cat"), False), (("a", "b", "c"), False)],
)
def test_a_head_is_kept_if_it_knows_the_same_labels(prepared, tmp_path, labels, is_kept):
    classifier = write_classifier(tmp_path / "classifier", labels)
    planned = plan_finetune(tiny_finetuning.config(prepared, tmp_path / "run", model=classifier))
    model = door._load_classifier(planned)
    before = weights(classifier)
    assert model.classifier.weight.shape == (2, 16)
    assert torch.equal(model.pooling.scorer.weight, before["pooling.scorer.weight"]) == is_kept
    assert torch.equal(model.mabert.norm.weight, before["mabert.norm.weight"])
    if labels[:2] != ("a", "b"):
        assert torch.equal(model.classifier.weight, before["classifier.weight"]) == is_kept


# Selection


def test_the_best_epoch_is_kept_and_dev_is_not_asked(prepared, tmp_path, monkeypatch):
    """Epoch 2 scores best on the rows that were held out for it; the run's model is the one after epoch 2."""
    seen, after = [], {}
    original = finetune_scores.score

    def scripted(split, logits, data):
        result = original(split, logits, data)
        seen.append(next((name for name, dev in data.evaluation.items() if dev is split), "selection"))
        if split is data.selection:
            result.metrics["accuracy"] = [0.5, 0.9, 0.7][len(seen) - 1]
        return result

    original_step = BestEpoch.on_step_end

    def remember(self, args, state, control, model=None, **kwargs):
        original_step(self, args, state, control, model=model, **kwargs)
        after[state.global_step] = model.classifier.weight.detach().clone()

    for module in (door, finetune_scores):
        monkeypatch.setattr(module, "score", scripted)
    monkeypatch.setattr(BestEpoch, "on_step_end", remember)
    config = tiny_finetuning.config(prepared, tmp_path, select="best", epochs=3, max_train_rows=64)
    result = finetune(config)
    assert seen == ["selection", "selection", "selection", "dev"]
    assert result.selection["epoch"] == 2
    assert result.selection["accuracy"] == 0.9
    assert torch.equal(weights(tmp_path)["classifier.weight"], after[4])
    assert not torch.equal(after[4], after[6])
    records = [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()]
    assert [(record["step"], record["epoch"], record["accuracy"]) for record in records] == [
        (2, 1, 0.5),
        (4, 2, 0.9),
        (6, 3, 0.7),
    ]
    assert not (tmp_path / "best").exists()


def test_a_bf16_run_selects_by_what_its_model_does_in_fp32(prepared, tmp_path, monkeypatch):
    dtypes, original = {}, finetune_scores.split_logits

    def watch(model, tokenizer, split, name, console):
        seen = dtypes.setdefault(name, set())
        with model.classifier.register_forward_hook(lambda module, _, output: seen.add(output.dtype)):
            return original(model, tokenizer, split, name, console)

    trained = []
    step = FinetuneTrainer.training_step

    def train(self, model, *args, **kwargs):
        with model.classifier.register_forward_hook(lambda module, _, output: trained.append(output.dtype)):
            return step(self, model, *args, **kwargs)

    for module in (door, finetune_scores):
        monkeypatch.setattr(module, "split_logits", watch)
    monkeypatch.setattr(FinetuneTrainer, "training_step", train)
    finetune(tiny_finetuning.config(prepared, tmp_path, select="best", epochs=2, max_train_rows=64, bf16=True))
    assert dtypes == {"selection": {torch.float32}, "dev": {torch.float32}}
    assert set(trained) == {torch.bfloat16}  # also after the first selection


# Stopping and going on


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_killed_run_goes_on_exactly(prepared, tmp_path, monkeypatch, select):
    changes = {"select": select, "epochs": 3, "max_train_rows": 80, "checkpoint_every": 3}
    whole = finetune(tiny_finetuning.config(prepared, tmp_path / "whole", **changes))
    killed = tiny_finetuning.config(prepared, tmp_path / "killed", **changes)
    original, steps = FinetuneTrainer.training_step, []

    def die_once(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "training_step", die_once)
    with pytest.raises(Killed):
        finetune(killed)
    assert (tmp_path / "killed" / "checkpoint-3").is_dir()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    resumed = finetune(killed)
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    assert losses(resumed.output) == losses(whole.output)
    assert same_weights(resumed.output, whole.output)
    assert resumed.splits == whole.splits
    assert resumed.selection == whole.selection


def test_a_signal_saves_and_stops(prepared, short, tmp_path, monkeypatch):
    config = tiny_finetuning.config(prepared, tmp_path)
    original = FinetuneTrainer.training_step

    def signal_in_step_2(self, *args, **kwargs):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", signal_in_step_2)
        with pytest.raises(TrainingInterruptedError, match="Stopped by SIGTERM after step 2"):
            finetune(config)
    finetune(config)
    assert losses(tmp_path) == losses(short.output)
    assert same_weights(tmp_path, short.output)


def test_a_run_killed_after_its_last_step_is_only_evaluated(prepared, short, tmp_path, monkeypatch):
    config = tiny_finetuning.config(prepared, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(door, "publish", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            finetune(config)
    monkeypatch.setattr(FinetuneTrainer, "training_step", None)
    assert finetune(config).splits == short.splits
    assert same_weights(tmp_path, short.output)


def test_a_finished_run_is_not_run_again(prepared, short, monkeypatch):
    monkeypatch.setattr(door, "plan_finetune", None)
    assert finetune(tiny_finetuning.config(prepared, short.output)) == short
    with pytest.raises(ValueError, match=r"short holds a run with other choices: epochs was 1, is now 2"):
        finetune(tiny_finetuning.config(prepared, short.output, epochs=2))


# What is refused


def test_an_output_folder_with_another_model_is_refused(prepared):
    with pytest.raises(ValueError, match="mlm holds another model"):
        finetune(tiny_finetuning.config(prepared, prepared / "mlm"))


def test_sequences_over_the_models_maximum_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"max_length=64 is over the model's maximum of 32 tokens: lower it, or call"):
        finetune(tiny_finetuning.config(prepared, tmp_path, max_length=64))
    assert not list(tmp_path.iterdir())


def test_contradicting_overrides_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="psm='pre' says what to do with pads"):
        finetune(tiny_finetuning.config(prepared, tmp_path, psm="pre"))


def test_weights_of_another_pattern_are_refused(prepared, tmp_path):
    folder = write_mabert(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pattern": "MTMT"}))
    with pytest.raises(ModelFolderError, match=r"do not belong to its config.json"):
        finetune(tiny_finetuning.config(prepared, tmp_path / "run", model=folder))


def test_several_processes_are_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(door.TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="in one process, not in 2: start it without torchrun"):
        finetune(tiny_finetuning.config(prepared, tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run(prepared, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step"):
        finetune(tiny_finetuning.config(prepared, tmp_path, learning_rate=1e30, max_grad_norm=0, epochs=2))


def test_the_plan_counts_without_training(prepared, tmp_path):
    planned = plan_finetune(tiny_finetuning.config(prepared, tmp_path, epochs=3, max_train_rows=80, batch_size=32))
    assert planned.schedule.steps == math.ceil(3 * 80 / 32)
    tokens = sum(len(feature["input_ids"]) for feature in planned.data.train.features)
    assert 3 * tokens <= planned.tokens < 3 * tokens + 16 * 14
    model = AutoModelForSequenceClassification.from_config(planned.model)
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not list(tmp_path.iterdir())


def test_the_plan_shuffles_each_epoch_once(prepared, tmp_path, monkeypatch):
    planned = plan_finetune(tiny_finetuning.config(prepared, tmp_path, epochs=3))
    made = []
    permuted = batches.permuted_index
    monkeypatch.setattr(batches, "permuted_index", lambda *place: made.append(place) or permuted(*place))
    assert sum(planned.tokens_of(step) for step in range(planned.schedule.steps)) == planned.tokens
    assert len(made) == len(set(made)) == 3


def test_the_estimate_counts_the_longest_rows_and_every_step(prepared, tmp_path):
    def measured(**changes):
        return estimate_finetune(plan_finetune(tiny_finetuning.config(prepared, tmp_path, **changes)))

    estimate = measured()
    typical, _longest = estimate.step_seconds
    assert estimate.seconds == pytest.approx(3 * typical)
    parameters = plan_finetune(tiny_finetuning.config(prepared, tmp_path)).parameters
    assert (estimate.weights, estimate.optimizer) == (4 * parameters, 8 * parameters)
    assert measured(micro_batch_size=8).activations < 0.6 * estimate.activations
    assert measured(max_length=8).activations < 0.8 * estimate.activations


def test_rows_are_padded_to_the_greatest_length_where_asked_for(prepared, tmp_path, monkeypatch):
    """In training and in the evaluation; pads then reach a model without padding-safe masking."""
    lengths = {True: set(), False: set()}
    original = MaBertForSequenceClassification.forward

    def watch(self, input_ids=None, **inputs):
        lengths[self.training].add(input_ids.shape[1])
        return original(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(MaBertForSequenceClassification, "forward", watch)
    choices = {"execution": "padded", "psm": "none", "pooling": "cls"}
    longest = finetune(tiny_finetuning.config(prepared, tmp_path / "to-32", pad_to_max_length=True, **choices))
    assert lengths == {True: {32}, False: {32}}
    shortest = finetune(tiny_finetuning.config(prepared, tmp_path / "as-needed", **choices))
    assert len(lengths[True]) > 1
    assert losses(longest.output) != losses(shortest.output)


@pytest.mark.parametrize("name", [*BASELINES, "ModernBERT"])
def test_pairs_are_fine_tuned_with_every_baseline(prepared, tmp_path, name):
    """Some of them know no second segment."""
    scale = replace(SCALES["tiny"](), hidden_size=16, intermediate_size=16, stage_lengths=(32,), stage_fractions=(1.0,))
    tokenizer = tiny_tokenizer()
    model = AutoModelForMaskedLM.from_config(architecture(name, scale, Vocabulary(len(tokenizer))))
    model.save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    run = tiny_finetuning.config(prepared, tmp_path / "run", model=tmp_path / "mlm", text_pair_column="second")
    result = finetune(run)
    assert 0 <= result.splits["dev"].metrics["accuracy"] <= 1
    assert predict(["the cat sees"], ["a dog"], model_folder=tmp_path / "run")[0].label in ("cat", "other")
