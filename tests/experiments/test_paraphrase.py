"""Continual training on paraphrases: what is trained on, what is measured, and that a planted gain is found."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_experiments import QUIET, SECONDS, suite

from mabert import HybridConfig, HybridForCausalLM
from mabert.data.generated import paraphrases, sentences
from mabert.data.tokenizer import for_generation, train_tokenizer
from mabert.experiments.cells import run_cells
from mabert.experiments.paraphrase import Paraphrase, gain, label
from mabert.experiments.scales import ParaphraseScale
from mabert.experiments.transpoints import TransPoints


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paraphrase")
    ours = suite(folder)
    experiment = Paraphrase(TransPoints(ours.pretraining.sources, ours.pretraining.work, QUIET))
    (paraphrased,) = (a for a in experiment.augmentations() if label(a) == "paraphrase@25")
    cells = [experiment.before("sequential"), experiment.after("sequential", paraphrased, 0)]
    run_cells(cells, ours.finetuning.store, console=QUIET)
    return experiment, cells, folder


def content(made, cell):
    return json.loads((made[2] / "results" / f"{cell.name}.json").read_text())


def test_every_kind_order_and_control_is_a_cell(made):
    names = [cell.name for cell in made[0].cells()]
    assert names == [
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
        assert result["gains"].keys() == {"paraphrase", "verbatim"}
        assert result["held_out_loss"] > 0
        assert result["gains"]["verbatim"]["gain"] == pytest.approx(
            result["gains"]["verbatim"]["alone"] - result["gains"]["verbatim"]["behind"]
        )
    assert after["tokens"] == 2 * 2 * 128
    config = content(made, made[1][1])["config"]
    assert config["augmentation"]["ratio"] == 0.25
    assert config["pairs"].keys() == {"generated"}


def test_no_text_or_model_of_a_run_is_left(made):
    assert not list((made[2] / "work" / "paraphrase").rglob("*.safetensors"))
    assert not list((made[2] / "work" / "paraphrase").rglob("text.txt"))


def test_held_out_pairs_are_not_trained_on(made):
    train, held_out = made[0].sources.pairs()
    assert not set(train) & set(held_out)
    assert len(held_out) == 100


def test_generated_paraphrases_say_the_same_in_other_words():
    pairs = paraphrases(50)
    assert pairs == paraphrases(60)[:50]
    for passage, paraphrase in pairs:
        assert passage != paraphrase
        words = set(passage.lower().replace(".", "").split())
        assert words <= set(paraphrase.lower().replace(".", "").split())
        assert set(paraphrase.lower().replace(".", "").split()) - words <= {"it", "is", "that"}


class Copier:
    """A model that predicts what stands earlier in its row better than anything else."""

    device = torch.device("cpu")

    def __call__(self, ids, labels, use_cache):
        row, target = ids[0].tolist(), labels[0][labels[0] != -100].tolist()
        before = row[: len(row) - len(target)]
        seen = any(before[i : i + len(target)] == target for i in range(len(before)))
        return SimpleNamespace(loss=torch.tensor(1.0 if seen else 3.0))


def test_a_planted_gain_is_found():
    texts = sentences(12)
    tokenizer = for_generation(train_tokenizer(texts * 3, vocab_size=300))
    pairs = list(zip(texts[:6], texts[6:], strict=True))
    assert gain(Copier(), tokenizer, pairs, 0, 0) == {"alone": 3.0, "behind": 1.0, "gain": 2.0}
    assert gain(Copier(), tokenizer, pairs, 0, 1)["gain"] == 0.0


def test_a_gain_is_that_of_the_text_alone():
    """By hand, on a model: only the target's tokens count, weighted by their number."""
    texts = sentences(4)
    tokenizer = for_generation(train_tokenizer(texts * 3, vocab_size=300))
    torch.manual_seed(0)
    config = HybridConfig(vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, intermediate_size=64,
                          pattern="TT", initializer_range=0.3)  # fmt: skip
    model = HybridForCausalLM(config).eval()
    pairs = [(texts[0], texts[1]), (texts[2], texts[3])]
    losses = {"alone": [], "behind": []}
    for first, then in pairs:
        context, target = (tokenizer(text, add_special_tokens=False).input_ids for text in (first, then))
        for name, before in (("alone", []), ("behind", context)):
            row = torch.tensor([[tokenizer.cls_token_id, *before, *target]])
            with torch.no_grad():
                logits = model(row, use_cache=False).logits[0, -len(target) - 1 : -1]
            losses[name].append(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
    found = gain(model, tokenizer, pairs, 0, 1)
    for name in ("alone", "behind"):
        assert found[name] == pytest.approx(float(torch.cat(losses[name]).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("RNN",)}, "paraphrase.models: there is no 'RNN'"),
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
