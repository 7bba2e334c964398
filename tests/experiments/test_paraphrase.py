"""Continual training on paraphrases: what is trained on, what is measured, and that a planted gain is found."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from tiny_experiments import QUIET, SECONDS, suite

from mabert import HybridConfig, HybridForCausalLM
from mabert.data.generated import paraphrases, sentences
from mabert.data.recall import Language
from mabert.data.rows import Rows
from mabert.data.shards import Shards
from mabert.data.tokenizer import for_generation, load_tokenizer, train_tokenizer
from mabert.experiments import paraphrase as module
from mabert.experiments.cells import run_cells
from mabert.experiments.paraphrase import Paraphrase, evenly, gain, label
from mabert.experiments.scales import ParaphraseScale
from mabert.experiments.sources import Sources
from mabert.experiments.transpoints import TransPoints
from mabert.files import digest
from mabert.inference.loading import load_model
from mabert.training.pretrain import PretrainTrainer
from mabert.training.recall import EVALUATION_SEED, evaluate_recall

# Learning so fast that two steps move every score.
SCALE = replace(SECONDS, paraphrase=replace(SECONDS.paraphrase, learning_rate=1e-2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paraphrase")
    experiment, store = experiment_in(folder)
    cells = [experiment.before("sequential"), experiment.after("sequential", augmentation(experiment), 0)]
    run_cells([cells[0], keeping_its_model(cells[1], folder / "after")], store, console=QUIET)
    return experiment, cells, folder


def experiment_in(folder):
    ours = suite(folder, SCALE)
    models = TransPoints(ours.pretraining.sources, ours.pretraining.work, QUIET)
    return Paraphrase(models), ours.finetuning.store


def keeping_its_model(cell, folder):
    def run():
        result = cell.run()
        shutil.copytree(cell.scratch / "run", folder)
        return result

    return replace(cell, run=run)


def augmentation(experiment, name="paraphrase@25"):
    (found,) = (a for a in experiment.augmentations() if label(a) == name)
    return found


def at(experiment, **changes):
    """The experiment on the same prepared text, at a scale with other choices of paraphrases."""
    models, sources = experiment.models, experiment.sources
    scale = replace(sources.scale, paraphrase=replace(sources.scale.paraphrase, **changes))
    return Paraphrase(replace(models, sources=replace(sources, scale=scale)))


def content(made, cell):
    return json.loads((made[2] / "results" / f"{cell.name}.json").read_text())


def test_every_kind_order_and_control_is_a_cell(made):
    names = [cell.name for cell in made[0].cells()]
    assert names == [
        "paraphrase/sequential/base/0",
        "paraphrase/sequential/before/0",
        "paraphrase/sequential/none/0",
        "paraphrase/sequential/paraphrase@25/0",
        "paraphrase/sequential/paraphrase@25,paraphrase-first/0",
        "paraphrase/sequential/verbatim@25/0",
        "paraphrase/sequential/unrelated@25/0",
        "paraphrase/sequential/apart@25/0",
    ]


def test_recall_and_gains_are_measured_before_and_after(made):
    before, after = (content(made, cell)["result"] for cell in made[1])
    assert before["weights"] != after["weights"]
    for result in (before, after):
        assert result["recall"].keys() == {"mqar", "phonebook", "passkey"}
        assert {tuple(scores) for scores in result["recall"].values()} == {("32", "128")}
        assert result["gains"].keys() == {"paraphrase", "verbatim"}
        assert result["held_out_loss"] > 0
        assert result["gains"]["verbatim"]["gain"] == pytest.approx(
            result["gains"]["verbatim"]["behind_another"] - result["gains"]["verbatim"]["behind"]
        )
    assert after["tokens"] == 2 * 2 * 128
    config = content(made, made[1][1])["config"]
    assert config["augmentation"]["ratio"] == 0.25
    assert config["pairs"].keys() == {"generated"}


@pytest.mark.parametrize("index", [0, 1], ids=["before", "after"])
def test_scores_are_those_of_the_model_on_what_is_held_out(made, index):
    experiment, cells, folder = made
    result = content(made, cells[index])["result"]
    model_folder = (experiment.base("sequential").artifact.parent, folder / "after")[index]
    assert result["weights"] == digest(model_folder / "model.safetensors")
    model, tokenizer = load_model(HybridForCausalLM, model_folder), load_tokenizer(model_folder)
    close = partial(pytest.approx, rel=1e-5, abs=1e-6)

    language = experiment._language("valid")
    for task in SCALE.asked_in_words():
        guessing = task.guessing(4, EVALUATION_SEED)
        expected = asdict(evaluate_recall(model, task, 4, language=language)) | {"guessing": guessing}
        assert result["recall"][task.kind][str(task.length)] == close(expected)

    pairs = experiment.sources.pairs()[1][:4]
    assert result["gains"]["paraphrase"] == close(gain(model, tokenizer, pairs, 0, 1))
    assert result["gains"]["verbatim"] == close(gain(model, tokenizer, pairs, 0, 0))

    rows = Rows(Shards(experiment.sources.shards / "valid", tokenizer), 128, "full-sentences")
    ids = [torch.tensor(rows[len(rows) * quarter // 4][0])[None].to(model.device) for quarter in range(4)]
    losses = [model(row, labels=row).loss.item() for row in ids]
    assert result["held_out_loss"] == close(fmean(losses))


def test_training_moves_every_score(made):
    before, after = (content(made, cell)["result"] for cell in made[1])
    assert abs(before["held_out_loss"] - after["held_out_loss"]) > 1e-4
    for kind, scores in before["recall"].items():
        for length, score in scores.items():
            assert abs(score["loss"] - after["recall"][kind][length]["loss"]) > 1e-4
    for name, losses in before["gains"].items():
        for part, loss in losses.items():
            assert abs(loss - after["gains"][name][part]) > 1e-4, (name, part)


def test_a_stopped_cell_goes_on_with_the_same_result(made, tmp_path, monkeypatch):
    experiment, store = experiment_in(shutil.copytree(made[2], tmp_path / "stopped"))
    cell = experiment.after("sequential", augmentation(experiment), 0)
    whole = store.read(cell)
    store.path(cell).unlink()
    steps = []

    def step(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        if steps == [0, 1]:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    original = PretrainTrainer.training_step
    monkeypatch.setattr(PretrainTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], store, console=QUIET)
    run_cells([cell], store, console=QUIET)
    assert steps == [0, 1, 1]
    assert store.read(cell) == whole


def test_only_what_was_taught_is_left_of_texts_and_models(made):
    folder = made[2] / "work" / "paraphrase"
    assert [path.relative_to(folder) for path in folder.rglob("*.safetensors")] == [
        Path("sequential/base/0/model.safetensors")
    ]
    assert not list(folder.rglob("text.txt"))
    assert not list(folder.rglob("*.pt"))


def test_a_checkpoint_is_taught_before_everything(made):
    experiment = made[0]
    base = experiment.base("sequential")
    taught = content(made, base)
    assert (taught["config"]["task"]["kind"], taught["config"]["task"]["length"]) == ("mqar", 32)
    assert taught["config"]["run"]["steps"] == 4
    assert [lesson["pairs"] for lesson in taught["result"]["lessons"]] == [0, 1]
    assert (taught["result"]["taught"], len(taught["result"]["losses"])) == (8, 4)
    pretrained = json.loads((made[2] / "results" / "causal" / "sequential" / "0.json").read_text())["result"]
    assert taught["result"]["weights"] != pretrained["weights"]
    assert content(made, made[1][0])["result"]["weights"] == taught["result"]["weights"]
    for cell in made[1]:
        assert cell.needs == (base,)
        assert content(made, cell)["config"]["checkpoint"] == taught["config"]
    folder = base.artifact.parent
    assert load_model(module.AutoModelForCausalLM, folder).config.model_type == "mabert_hybrid"
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(experiment.sources.tokenizer).get_vocab()


def test_taught_is_on_training_text_and_asked_on_held_out_text_in_the_same_words(made, monkeypatch):
    experiment, seen = made[0], {}

    def train(model, tasks, run, report, *, language, text_shape, checkpoint):
        seen["taught"] = tasks, run, language
        assert text_shape == experiment.base("sequential").config["text_shape"] == (1, 128)
        raise RecordedError

    def evaluate(model, task, rows, *, language, batch_size):
        seen["asked"] = task, language
        raise RecordedError

    monkeypatch.setattr(module, "train_recall", train)
    monkeypatch.setattr(module, "evaluate_recall", evaluate)
    for cell in (experiment.base("sequential"), experiment.before("sequential")):
        with pytest.raises(RecordedError):
            cell.run()
    (tasks, run, taught), (_, asked) = seen["taught"], seen["asked"]
    assert [task.kind for task in tasks] == ["mqar"]
    assert run.seed != EVALUATION_SEED
    assert taught.words.tolist() == asked.words.tolist()
    tokenizer = load_tokenizer(experiment.sources.tokenizer)
    for split, other, language in (("train", "valid", taught), ("valid", "train", asked)):
        tokens = {name: experiment._shards(name) for name in (split, other)}
        piece = language.text[:128].tolist()
        found = {name: contains(shards.tokens(0, shards.n_tokens).tolist(), piece) for name, shards in tokens.items()}
        assert found == {split: True, other: False}, tokenizer.decode(piece)


def test_teaching_has_a_seed_of_its_own(made, monkeypatch):
    drawn = []

    def train(*_, **__):
        drawn.append(torch.rand(1).item())
        raise RecordedError

    monkeypatch.setattr(module, "train_recall", train)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.raises(RecordedError):
            made[0].base("sequential").run()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("bf16", "gpu"), [(True, True), (True, False), (False, True)])
def test_bf16_in_teaching_takes_the_scale_and_a_gpu(made, monkeypatch, bf16, gpu):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: gpu)
    models, sources = made[0].models, made[0].sources
    experiment = Paraphrase(replace(models, sources=replace(sources, scale=replace(SCALE, bf16=bf16))))
    assert experiment.base("sequential").config["run"]["bf16"] is (bf16 and gpu)


def test_words_that_were_taught_are_asked_whatever_the_held_out_text_has(made, monkeypatch):
    experiment, text = made[0], Paraphrase._text
    taught = experiment._language("train")

    def lacks_a_word(self, split):
        found = text(self, split)
        return found if split == "train" else found[found != taught.words[20]]

    monkeypatch.setattr(Paraphrase, "_text", lacks_a_word)
    asked = experiment._language("valid")
    own = Language.of(load_tokenizer(experiment.sources.tokenizer), asked.text)
    assert own.words.tolist() != taught.words.tolist()
    assert asked.words.tolist() == taught.words.tolist()


def contains(row, piece):
    return any(row[start : start + len(piece)] == piece for start in range(len(row) - len(piece) + 1))


def test_without_teaching_everything_starts_from_the_pretrained_checkpoint(made):
    experiment = at(made[0], taught=0)
    assert "paraphrase/sequential/base/0" not in [cell.name for cell in experiment.cells()]
    pretrained = experiment.models.pretraining("sequential")
    for cell in (experiment.before("sequential"), experiment.after("sequential", augmentation(experiment), 0)):
        assert cell.needs == (pretrained,)
        assert cell.config["checkpoint"] == pretrained.config


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"taught": 6}, {"steps": 6, "lesson_steps": (6, 6)}),
        ({"taught_tokens": 48}, {"tokens": 48, "lesson_tokens": 48}),
        ({"taught_learning_rate": 0.5}, {"learning_rate": 0.5}),
    ],
)
def test_choices_of_teaching_reach_it(made, changes, changed):
    before, after = (experiment.base("sequential").config["run"] for experiment in (made[0], at(made[0], **changes)))
    assert {name: value for name, value in after.items() if value != before[name]} == changed


class RecordedError(Exception):
    """Instead of a training."""


def trained_on(experiment, monkeypatch, name, seed=0):
    """What `pretrain` would have been given for a kind of text, and the documents in it."""
    given = []

    def record(config, **_):
        given.append((config, Path(config.train[0]).read_text(encoding="utf-8").strip().split("\n\n")))
        raise RecordedError

    monkeypatch.setattr(module, "pretrain", record)
    with pytest.raises(RecordedError):
        experiment.after("sequential", augmentation(experiment, name), seed).run()
    ((config, documents),) = given
    return config, documents


@pytest.fixture(scope="module")
def longer(made):
    """Enough text for dozens of pairs, without gaps."""
    return at(made[0], steps=30, gap=(0, 0), ratios=(0.25, 0.5))


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("paraphrase@25", 0, 1),
        ("paraphrase@50", 0, 1),
        ("paraphrase@50,paraphrase-first", 1, 0),
        ("verbatim@50", 0, 0),
    ],
)
def test_pairs_are_trained_on_as_their_kind_says(longer, monkeypatch, name, first, second):
    config, documents = trained_on(longer, monkeypatch, name)
    pairs, _ = longer.sources.pairs()
    made = {f"{pair[first]} {pair[second]}" for pair in pairs}
    share = sum(len(document.split()) for document in documents if document in made)
    share /= sum(len(document.split()) for document in documents)
    assert share == pytest.approx(float(name.partition("@")[2][:2]) / 100, abs=0.03)
    assert config.init_from == longer.base("sequential").artifact.parent
    assert (config.steps, config.learning_rate) == (30, longer.scale.learning_rate)


def test_controls_are_trained_on_as_their_kind_says(longer, monkeypatch):
    pairs, _ = longer.sources.pairs()
    passages, paraphrases = (set(texts) for texts in zip(*pairs, strict=True))
    own = {f"{first} {second}" for first, second in pairs} | {f"{first} {first}" for first, _ in pairs}

    def halves(document):
        """Two texts of the pairs that make a document."""
        known = passages | paraphrases
        cuts = [at for at, letter in enumerate(document) if letter == " "]
        return [(document[:at], document[at + 1 :]) for at in cuts if {document[:at], document[at + 1 :]} <= known]

    _, none = trained_on(longer, monkeypatch, "none")
    assert not [document for document in none if document in passages | paraphrases or halves(document)]

    _, unrelated = trained_on(longer, monkeypatch, "unrelated@50")
    joined = [found for document in unrelated for found in halves(document)]
    assert len(joined) > 20
    assert {text for pair in joined for text in pair} <= passages
    assert not set(unrelated) & own

    config, apart = trained_on(longer, monkeypatch, "apart@50")
    assert config.packing == "documents"  # in rows of full sentences one would be read behind the other
    alone = {document for document in apart if document in passages | paraphrases}
    assert len(alone) > 40
    assert sum(passage in alone and paraphrase in alone for passage, paraphrase in pairs) >= len(alone) // 2 - 1
    assert not [document for document in apart if halves(document)]


def test_the_seed_reaches_text_training_and_config(longer, monkeypatch):
    (one, text), (again, same), (other, different) = (
        trained_on(longer, monkeypatch, "paraphrase@25", seed) for seed in (0, 0, 1)
    )
    assert (one.seed, again.seed, other.seed) == (0, 0, 1)
    assert text == same
    assert set(text) != set(different)
    for seed in (0, 1):
        config = longer.after("sequential", augmentation(longer), seed).config
        assert (config["seed"], config["augmentation"]["seed"]) == (seed, seed)


def test_unmodified_text_is_of_all_files(made, monkeypatch, tmp_path):
    experiment = made[0]
    files = [tmp_path / f"{name}.train.txt" for name in "ab"]
    for path in files:
        path.write_text("\n\n".join(f"{path.name[0]} {n} " + "word " * 8 for n in range(500)), encoding="utf-8")
    monkeypatch.setattr(Sources, "texts", lambda self, split: tuple(map(str, files)))
    _, documents = trained_on(experiment, monkeypatch, "none")
    assert len(documents) < 50  # far less than the first file holds
    assert {document.split()[0] for document in documents} == {"a", "b"}


def test_a_text_with_fewer_words_than_the_steps_take_is_read_several_times(made, monkeypatch):
    experiment = made[0]
    pieces = [piece for name in experiment.sources.texts("train") for piece in Path(name).read_text().splitlines()]
    there = sum(len(piece.split()) for piece in pieces)
    config, documents = trained_on(at(experiment, steps=10_000), monkeypatch, "none")
    assert config.steps == 10_000
    assert sum(len(document.split()) for document in documents) == there


def test_too_few_pairs_are_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "paraphrase").mkdir()
    (tmp_path / "paraphrase" / "few.tsv").write_text("one\ttwo\nA b .\tB a .\nC d .\tD c .\n")
    experiment, _ = experiment_in(tmp_path)
    few = replace(experiment.models, sources=replace(experiment.sources, data=tmp_path))
    with pytest.raises(ValueError, match="1 pairs to train on and 1 held out are too few"):
        next(Paraphrase(few).cells())


def test_what_is_held_out_is_measured_all_over(made, monkeypatch):
    assert evenly(4, 10) == [0, 2, 5, 7]
    assert evenly(9, 3) == [0, 1, 2]
    asked = []

    def evaluate(model, dataset, keys, **_):
        asked.append((keys, len(dataset)))
        raise RecordedError

    monkeypatch.setattr(module, "evaluate_held_out", evaluate)
    with pytest.raises(RecordedError):
        made[0].before("sequential").run()
    ((keys, rows),) = asked
    assert keys == [(0, 0, rows * quarter // 4) for quarter in range(4)]
    assert keys[1][2] > 1


def test_text_between_facts_is_from_all_over(made, monkeypatch):
    monkeypatch.setattr(module, "LANGUAGE_TOKENS", 4 * 128)
    text, shards = made[0]._text("train"), made[0]._shards("train")
    assert text.shape == (4 * 128,)
    for quarter in range(4):
        start = -(-shards.n_tokens // 128) * quarter // 4 * 128
        assert text[quarter * 128 :][:128].tolist() == shards.tokens(start, start + 128).tolist()


def test_held_out_pairs_are_not_trained_on(made):
    train, held_out = made[0].sources.pairs()
    assert not set(train) & set(held_out)
    assert len(held_out) == 100


def test_no_text_of_a_held_out_pair_is_in_another_pair_that_is_trained_on(tmp_path):
    pairs = [(f"passage {n}", f"rewording {n}") for n in range(40)]
    pairs[10] = (pairs[5][0], "said in a third way")  # every tenth is held out
    pairs[20] = ("another passage", pairs[7][1])
    pairs[30] = (pairs[8][1], "turned round")
    folder = tmp_path / "data" / "paraphrase"
    folder.mkdir(parents=True)
    folder.joinpath("a.tsv").write_text("one\ttwo\n" + "".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    train, held_out = Sources(SECONDS, tmp_path / "work", tmp_path / "data").pairs()
    assert held_out == [pairs[0]]
    assert train == [pair for n, pair in enumerate(pairs) if n % 10]


def test_generated_paraphrases_say_the_same_in_other_words():
    pairs = paraphrases(50)
    assert pairs == paraphrases(60)[:50]
    for passage, paraphrase in pairs:
        assert passage != paraphrase
        words = set(passage.lower().replace(".", "").split())
        assert words <= set(paraphrase.lower().replace(".", "").split())
        assert set(paraphrase.lower().replace(".", "").split()) - words <= {"it", "is", "that"}


class Reader:
    """A model that predicts a text worst at the beginning, better behind anything, and best behind itself."""

    device = torch.device("cpu")

    def __init__(self, copies):
        self.copies = copies

    def __call__(self, ids, labels, use_cache):
        row, target = ids[0].tolist(), labels[0][labels[0] != -100].tolist()
        before = row[1 : len(row) - len(target)]
        seen = any(before[i : i + len(target)] == target for i in range(len(before)))
        return SimpleNamespace(loss=torch.tensor((1.0 if self.copies and seen else 2.5) if before else 3.0))


@pytest.mark.parametrize(("copies", "then", "behind"), [(True, 0, 1.0), (True, 1, 2.5), (False, 0, 2.5)])
def test_a_planted_gain_is_found_and_what_any_context_helps_is_none(copies, then, behind):
    texts = sentences(12)
    tokenizer = for_generation(train_tokenizer(texts * 3, vocab_size=300))
    pairs = list(zip(texts[:6], texts[6:], strict=True))
    assert gain(Reader(copies), tokenizer, pairs, 0, then) == {
        "alone": 3.0,
        "behind": behind,
        "behind_another": 2.5,
        "context": 0.5,
        "gain": 2.5 - behind,
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "0 held-out pairs are too few"),
        ([("A cat.", "A dog.")], "1 held-out pairs are too few"),
        ([("A cat.", "A dog."), ("A bird.", "")], "a held-out pair has an empty text"),
    ],
)
def test_pairs_that_tell_no_gain_are_refused(pairs, message):
    tokenizer = for_generation(train_tokenizer(sentences(12), vocab_size=300))
    with pytest.raises(ValueError, match=message):
        gain(Reader(True), tokenizer, pairs, 0, 1)


def test_a_gain_is_that_of_the_text_alone():
    """By hand, on a model: only the target's tokens count, weighted by their number."""
    texts = sentences(6)
    tokenizer = for_generation(train_tokenizer(texts * 3, vocab_size=300))
    torch.manual_seed(0)
    config = HybridConfig(vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, intermediate_size=64,
                          pattern="TT", initializer_range=0.3)  # fmt: skip
    model = HybridForCausalLM(config).eval()
    pairs = [(texts[0], texts[1]), (texts[2], texts[3]), (texts[4], texts[5])]
    losses = {"alone": [], "behind": [], "behind_another": []}
    for first, then, another in [(*pairs[0], texts[2]), (*pairs[1], texts[4]), (*pairs[2], texts[0])]:
        context, target, other = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (first, then, another)
        )
        for name, before in (("alone", []), ("behind", context), ("behind_another", other)):
            row = torch.tensor([[tokenizer.cls_token_id, *before, *target]])
            with torch.no_grad():
                logits = model(row, use_cache=False).logits[0, -len(target) - 1 : -1]
            losses[name].append(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
    found = gain(model, tokenizer, pairs, 0, 1)
    for name in losses:
        assert found[name] == pytest.approx(float(torch.cat(losses[name]).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("RNN",)}, "paraphrase.models: there is no 'RNN'"),
        *(
            ({name: ()}, f"paraphrase.{name} is empty: give at least one")
            for name in ("models", "kinds", "ratios", "orders")
        ),
        ({"learning_rate": 0.0}, "paraphrase.learning_rate=0.0 must be above 0"),
        ({"taught_learning_rate": -1.0}, "paraphrase.taught_learning_rate=-1.0 must be above 0"),
        ({"learning_rate": float("nan")}, "paraphrase.learning_rate=nan must be above 0"),
        ({"taught": -1}, "paraphrase.taught=-1 must not be negative"),
        ({"taught_tokens": 0}, "paraphrase.taught_tokens=0 must be at least 1"),
        ({"eval_rows": 1}, "paraphrase.eval_rows=1 must be at least 2"),
        ({"kinds": ("copy",)}, "kind='copy' is not one of"),
        ({"ratios": (2.0,)}, "ratio=2.0 must be above 0"),
        ({"steps": 0}, "paraphrase.steps=0 must be at least 1"),
    ],
)
def test_scales_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ParaphraseScale(**changes)


def test_rows_too_short_for_the_questions_are_refused():
    with pytest.raises(ValueError, match="facts of mqar and their questions take at least"):
        replace(SECONDS, paraphrase=replace(SECONDS.paraphrase, pairs=8))
