"""Every parameter of the models is random, biases too, so that no pad is harmless by being zero."""

import json
import random
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import mabert_config, sentence, tiny_tokenizer, write_bert, write_mabert
from transformers import AutoModel

from mabert import MaBertForMaskedLM, MaBertModel
from mabert.experiments import drift
from mabert.experiments.cells import Cell, CellStore, run_cells
from mabert.experiments.drift import MODES, PADS, ROUNDING, cosine_distance, drift_cells, findings, measure_drift
from mabert.experiments.stamp import stamp
from mabert.inference.loading import ModelFolderError, load_config, load_model

PADDED = [mode for mode in MODES if mode != "packed"]
OF_TOKENS = ("cls", "mean")


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return ["the cat", *(sentence(rng) for _ in range(7))]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders of models with random parameters, by scan direction and convolution."""
    folders = {}

    def folder(direction, conv):
        if (direction, conv) not in folders:
            torch.manual_seed(0)
            model = MaBertForMaskedLM(mabert_config(scan_direction=direction, conv_mode=conv))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "A_log" not in name:
                        parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1)
            folders[direction, conv] = tmp_path_factory.mktemp("model")
            model.save_pretrained(folders[direction, conv])
            tiny_tokenizer().save_pretrained(folders[direction, conv])
        return folders[direction, conv]

    return folder


def most(result, mode, measures=OF_TOKENS):
    return max(max(result["modes"][mode][measure]["max"]) for measure in measures)


class TestMeasure:
    @pytest.mark.parametrize(
        ("direction", "conv", "side"),
        list(product(("forward", "bidirectional"), ("centered", "causal"), ("right", "left"))),
    )
    def test_without_masks_pads_move_tokens_and_exact_and_packed_do_not(self, folder_of, texts, direction, conv, side):
        result = measure_drift(folder_of(direction, conv), texts, side=side, pads=(0, 2, 9))
        for mode, measures in result["modes"].items():
            for values in measures.values():
                assert [values[statistic][0] for statistic in ("mean", "std", "max")] == [0, 0, 0], mode
        for mode in ("exact", "packed"):
            assert most(result, mode, drift.MEASURES) <= ROUNDING
        nothing_reads_them = (direction, conv, side) == ("forward", "causal", "right")
        for measure in OF_TOKENS:
            drifts = result["modes"]["none"][measure]["mean"]
            assert all(drift <= ROUNDING if nothing_reads_them else drift > 1e-5 for drift in drifts[1:])
        for mode in ("pre", "pre+post"):  # a forward scan has gone past the tokens when it meets pads on the right
            assert (most(result, mode) <= ROUNDING) == (direction == "forward" and side == "right")
        assert (most(result, "post") <= ROUNDING) == nothing_reads_them

    def test_the_drift_of_a_state_that_meets_pads_first_grows_with_them(self, folder_of, texts):
        result = measure_drift(folder_of("forward", "causal"), texts, side="left", pads=(1, 8), modes=("pre",))
        for measure in OF_TOKENS:
            one, eight = result["modes"]["pre"][measure]["mean"]
            assert eight > 1.2 * one > 1e3 * ROUNDING

    @pytest.mark.parametrize("mode", ["none", "post", "exact", "packed"])
    @pytest.mark.parametrize(("side", "left"), [("right", 0), ("left", 5), ("both", 2)])
    def test_distances_are_those_of_each_sentence_run_by_itself(self, folder_of, texts, mode, side, left):
        folder = folder_of("bidirectional", "centered")
        model = load_model(AutoModel, folder, load_config(folder, **MODES[mode]))

        def vectors(text, pads_left, pads_right):
            ids = tiny_tokenizer()(text)["input_ids"]
            row = torch.tensor([[0] * pads_left + ids + [0] * pads_right])
            mask = torch.tensor([[0] * pads_left + [1] * len(ids) + [0] * pads_right])
            with torch.no_grad():
                states = model(row, attention_mask=mask).last_hidden_state[0].double().numpy()
            tokens = states[pads_left : pads_left + len(ids)]
            return {"cls": tokens[0], "mean": tokens.mean(0), "unmasked_mean": states.mean(0)}

        expected = {measure: [] for measure in drift.MEASURES}
        for text in texts:
            alone, padded = vectors(text, 0, 0), vectors(text, left, 5 - left)
            for measure, distances in expected.items():
                a, b = alone[measure], padded[measure]
                distances.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        result = measure_drift(folder, texts, side=side, pads=(5,), modes=(mode,))
        assert result["rows"] == len(texts)
        for measure, distances in expected.items():
            found = result["modes"][mode][measure]
            for statistic, value in (("mean", np.mean), ("std", np.std), ("max", np.max)):
                assert found[statistic] == [pytest.approx(value(distances), rel=1e-3, abs=1e-11)], (measure, statistic)

    def test_the_mean_over_all_positions_holds_the_pads_where_the_output_does(self, folder_of, texts):
        result = measure_drift(folder_of("forward", "centered"), texts, pads=(9,), modes=PADDED)
        for mode, measures in result["modes"].items():
            (tokens,), (positions,) = measures["mean"]["mean"], measures["unmasked_mean"]["mean"]
            if mode in ("none", "pre"):
                assert positions > 2 * tokens
            else:
                assert positions == pytest.approx(tokens, rel=1e-6, abs=1e-20)

    def test_what_pads_hold_counts_only_without_masks(self, folder_of, texts):
        options = {"pads": (2,), "modes": ("none", "exact", "packed")}
        pad, cat = (
            measure_drift(folder_of("forward", "centered"), texts, pad_content=content, **options)
            for content in ("[PAD]", "cat")
        )
        assert pad["modes"]["none"]["cls"]["mean"] != pytest.approx(cat["modes"]["none"]["cls"]["mean"], rel=1e-2)
        assert max(most(cat, mode, drift.MEASURES) for mode in ("exact", "packed")) <= ROUNDING

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_pads_take_no_position(self, folder_of, texts, side):
        folder = folder_of("bidirectional", "causal")
        assert load_config(folder).max_position_embeddings == 32
        result = measure_drift(folder, texts, side=side, pads=(40,), modes=("exact", "packed"))
        assert max(most(result, mode, drift.MEASURES) for mode in ("exact", "packed")) <= ROUNDING

    def test_long_texts_are_cut_and_counted(self, folder_of, texts):
        folder = folder_of("forward", "centered")
        options = {"pads": (2,), "modes": ("none",)}
        long, cut = (measure_drift(folder, [*texts, "cat " * n], **options) for n in (31, 30))
        assert (long["truncated"], cut["truncated"]) == (1, 0)
        assert long["modes"] == cut["modes"]

    def test_batches_are_of_one_length_and_of_bounded_size(self, folder_of, texts, monkeypatch):
        folder = folder_of("forward", "centered")
        shapes = []
        forward = MaBertModel.forward

        def counted(self, input_ids, **others):
            shapes.append((*input_ids.shape, int(others["attention_mask"].sum())))
            return forward(self, input_ids, **others)

        monkeypatch.setattr(MaBertModel, "forward", counted)
        monkeypatch.setattr(drift, "BATCH_TOKENS", 24)
        small = measure_drift(folder, texts * 3, pads=(2,), modes=("none",))
        for rows, length, tokens in shapes:
            assert rows == 1 or rows * length <= 24
            assert tokens in (rows * length, rows * (length - 2))
        monkeypatch.undo()
        large = measure_drift(folder, texts * 3, pads=(2,), modes=("none",))
        assert small["modes"]["none"]["cls"]["mean"] == pytest.approx(large["modes"]["none"]["cls"]["mean"], rel=1e-3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"texts": []}, "there are no texts"),
            ({"pads": (0, -1)}, r"pads=\(0, -1\) must be growing"),
            ({"pads": (-1, 2)}, "none below 0"),
            ({"pads": (4, 2)}, "growing"),
            ({"pads": ()}, "growing"),
            ({"side": "middle"}, "side='middle' is not one of 'right', 'left', 'both'"),
            ({"modes": ("none", "most")}, "no psm mode 'most'. There are none, pre, post, pre\\+post, exact, packed"),
            ({"pad_content": "zebra"}, "pad_content='zebra' is no token"),
        ],
    )
    def test_what_cannot_be_measured_is_refused(self, folder_of, changes, message):
        with pytest.raises(ValueError, match=message):
            measure_drift(folder_of("forward", "centered"), **{"texts": ["the cat"]} | changes)

    def test_a_model_without_psm_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="is a bert model: only a MaBERT has psm modes"):
            measure_drift(write_bert(tmp_path / "bert"), ["the cat"])
        with pytest.raises(ModelFolderError, match="does not exist"):
            measure_drift(tmp_path / "nothing", ["the cat"])

    def test_a_diverged_model_is_refused(self, tmp_path):
        folder = write_mabert(tmp_path)
        model = MaBertForMaskedLM.from_pretrained(folder)
        model.mabert.norm.bias.data[0] = float("nan")
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match="NaN or infinite outputs"):
            measure_drift(folder, ["the cat"])


class TestCosineDistance:
    def test_values_by_hand(self):
        a = torch.tensor([[1.0, 0], [1, 0], [3, 4], [3, 4]])
        b = torch.tensor([[0.0, 2], [-2, 0], [4, 3], [30, 40]])
        assert cosine_distance(a, b).tolist() == pytest.approx([1, 2, 1 - 24 / 25, 0], abs=1e-15)

    def test_equal_vectors_have_none_and_a_small_angle_keeps_its_digits(self):
        a = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
        assert (cosine_distance(a, a) == 0).all()
        angle = 1e-9
        turned = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float64)
        assert cosine_distance(torch.tensor([1.0, 0]), turned).item() == pytest.approx(angle**2 / 2, rel=1e-6)


def planted(pads=(0, 1, 8, 64), **drifts):
    """A result with the same numbers for every measure of a mode, or those given by measure."""
    still = [0.0] * len(pads)

    def values(of_mode, measure):
        chosen = of_mode.get(measure, still) if isinstance(of_mode, dict) else of_mode
        return {"mean": chosen, "std": still, "max": chosen}

    return {
        "pads": list(pads),
        "modes": {
            mode: {measure: values(drifts.get(mode.replace("+", "_"), still), measure) for measure in drift.MEASURES}
            for mode in MODES
        },
    }


def said(result, *choices):
    return "\n".join(findings(result, *(choices or ("bidirectional", "centered", "left"))))


GROWING, FLAT = [0, 1e-4, 1e-3, 1e-2], [0, 1e-2, 1e-2, 1e-2]


class TestFindings:
    def test_no_drift_where_nothing_reads_pads_is_called_so(self):
        text = said(planted(none={"unmasked_mean": GROWING}), "forward", "causal", "right")
        assert "Without PSM no token moves (largest drift 0): a forward scan and a causal convolution" in text
        assert "cannot show on tokens" in text
        assert "post-masking" not in text
        assert "the mean over all positions (pads too) drifts by 1.0e-04 at 1 pad and by 1.0e-02 at 64 pads" in text

    @pytest.mark.parametrize(
        "choices", list(product(("forward", "bidirectional"), ("centered", "causal"), ("right", "left")))
    )
    def test_no_drift_elsewhere_is_called_small(self, choices):
        expected = "read nothing behind" if choices == ("forward", "causal", "right") else "below rounding"
        assert expected in said(planted(none=[0, 1e-12, 1e-12, 3e-12]), *choices)
        assert "no token moves" not in said(planted(none=[0, 1e-12, 1e-12, 2 * ROUNDING]), *choices)

    @pytest.mark.parametrize(
        ("none", "expected"),
        [
            (GROWING, "drifts by 1.0e-04 at 1 pad and by 1.0e-02 at 64 pads: it grows, as in the paper."),
            (FLAT, "it does not grow, unlike in the paper; a scan's state decays"),
            ([0, 1e-4, 9.5e-3, 1e-2], "it grows up to 8 pads and then no more, as in the paper in part; a scan's"),
            ([0, 1e-2, 8e-3, 5e-3], "it falls, unlike in the paper"),
            ([0, 1e-13, 3e-13, 1e-12], "that is rounding."),
        ],
    )
    def test_how_drift_goes_on_with_the_padding(self, none, expected):
        for measure, name in drift.MEASURES.items():
            others = dict.fromkeys(drift.MEASURES, FLAT if none is GROWING else GROWING)
            (sentence,) = [
                line
                for line in findings(planted(none=others | {measure: none}), "bidirectional", "centered", "left")
                if line.startswith(f"Without PSM {name} ")
            ]
            assert expected.partition(";")[0] in sentence
            assert (";" in sentence) == (";" in expected and measure in OF_TOKENS)

    def test_why_drift_stops_growing_depends_on_what_reads_the_pads(self):
        assert "convolution's neighbours on the right" in said(planted(none=FLAT), "forward", "centered", "right")
        for choices in (("forward", "centered", "left"), ("bidirectional", "centered", "right")):
            text = said(planted(none=FLAT), *choices)
            assert "state decays" in text
            assert "neighbours on the right" not in text

    @pytest.mark.parametrize(("left", "strongly"), [(9e-4, True), (2e-3, False)])
    def test_how_much_the_papers_psm_leaves(self, left, strongly):
        both = [0, 0, 0, left]
        text = said(planted(none=FLAT, pre=both, pre_post={"mean": both}))
        assert f"leaves [CLS] 0 of 1.0e-02 and the mean of the tokens {left:.1e} of 1.0e-02" in text
        assert ("not strongly suppressed, unlike" in text) != strongly
        assert (": strongly suppressed, as in the paper" in text) == strongly

    @pytest.mark.parametrize(
        ("pre", "post", "expected"),
        [
            (1e-3, 5e-3, "post is worse, unlike in the paper"),
            (5e-3, 1e-3, "post is better, as in the paper"),
            (1e-3, 1.05e-3, "neither is better"),
            (1e-3, 1.2e-3, "post is worse, unlike in the paper"),
            (1e-13, 1e-12, "neither is better"),
        ],
    )
    def test_the_order_of_the_masks_on_tokens(self, pre, post, expected):
        for measure, name in (("cls", "[CLS]"), ("mean", "the mean of the tokens")):
            text = said(planted(none=FLAT, pre={measure: [0, 0, 0, pre]}, post={measure: [0, 0, 0, post]}))
            start = f"At 64 pads pre-masking lets {name} drift by {pre:.1e}, post-masking by {post:.1e}: "
            assert start + expected in text

    def test_both_masks_against_the_first(self):
        assert "as pre alone does (drifts differ by 0 at most) and not less" in said(
            planted(none=FLAT, pre=GROWING, pre_post=GROWING)
        )
        unlike = planted(none=FLAT, pre=GROWING, pre_post=[0, 1e-4, 3e-4, 1e-2])
        assert "differ on tokens by up to 7.0e-04, which Eqs. 1 to 3 exclude" in said(unlike)

    @pytest.mark.parametrize(
        ("pre", "post", "both", "tokens", "expected"),
        [
            (0.3, 1e-3, 1e-4, (1e-4, 1e-3), "and not because tokens move less."),
            (0.3, 1e-3, 1e-4, (1e-2, 1e-3), "in this mean."),
            (0.3, 1e-3, 1e-4, (1.05e-3, 1e-3), "and not because tokens move less."),
            (0.3, 1e-12, 2e-12, (1e-12, 1e-12), "and not because tokens move less."),
            (0.3, 1e-3, 1e-2, (1e-4, 1e-3), "not the paper's order."),
            (1e-3, 0.3, 1e-4, (1e-4, 1e-3), "not the paper's order."),
            (0.3, 0.29, 1e-4, (1e-4, 1e-3), "not the paper's order."),
        ],
    )
    def test_the_order_of_the_masks_over_all_positions(self, pre, post, both, tokens, expected):
        last = findings(
            planted(
                none=FLAT,
                pre={"unmasked_mean": [0, 0, 0, pre], "mean": [0, 0, 0, tokens[0]]},
                post={"unmasked_mean": [0, 0, 0, post], "mean": [0, 0, 0, tokens[1]]},
                pre_post={"unmasked_mean": [0, 0, 0, both]},
            ),
            "forward",
            "centered",
            "right",
        )[-1]
        assert f"drifts by {pre:.1e} with pre, {post:.1e} with post, {both:.1e} with pre+post" in last
        assert last.endswith(expected)

    @pytest.mark.parametrize("mode", ["exact", "packed"])
    def test_exact_and_packed_are_held_to_rounding(self, mode):
        within = said(planted(none=FLAT, **{mode: [0, 0, 1e-14, 0]}))
        assert "Up to 64 pads exact masking and packed execution do not drift" in within
        assert f"{mode} 1.0e-14" in within
        for measure in drift.MEASURES:
            drifting = planted(none=FLAT)
            drifting["modes"][mode][measure]["max"] = [0, 0, 2 * ROUNDING, 0]
            beyond = said(drifting)
            assert f"drifts by more than rounding ({ROUNDING:.1e})" in beyond
            assert f"{mode} {2 * ROUNDING:.1e}" in beyond

    def test_a_measured_model_is_read_as_its_table_says(self, folder_of, texts):
        vacuous = measure_drift(folder_of("forward", "causal"), texts, pads=(1, 8))
        assert "no token moves" in said(vacuous, "forward", "causal", "right")
        leaking = measure_drift(folder_of("forward", "centered"), texts, pads=(1, 8))
        text = said(leaking, "forward", "centered", "right")
        for expected in ("do not drift: exact", "strongly suppressed, as", "post is worse", "as pre alone does"):
            assert expected in text


class TestCells:
    def pretrained(self, folder):
        return Cell("pretraining/x/0", {"steps": 3}, dict, artifact=folder / "config.json")

    def test_each_model_has_a_cell_for_each_side(self, tmp_path):
        cell = self.pretrained(tmp_path)
        names = ("MaBERT", "MaBERT-bidirectional-causal")
        cells = drift_cells(
            SimpleNamespace(drift_rows=2), dict.fromkeys(names, cell), lambda: ("CoLA dev", ["a", "b", "c"])
        )
        assert [cell.name for cell in cells] == [
            "drift/MaBERT/forward-centered/right",
            "drift/MaBERT/forward-centered/left",
            "drift/MaBERT-bidirectional-causal/bidirectional-causal/right",
            "drift/MaBERT-bidirectional-causal/bidirectional-causal/left",
        ]
        for made in cells:
            assert made.needs == (cell,)
            assert (made.config["data"], made.config["rows"]) == ("CoLA dev", 2)
            assert made.config["pretraining"] == {"steps": 3}

    def test_a_cell_leaves_numbers_and_what_they_say(self, folder_of, tmp_path, texts):
        store = CellStore(tmp_path / "results", tmp_path / "work")
        cell = self.pretrained(folder_of("forward", "causal"))
        store.run(cell, stamp())
        right, left = drift_cells(
            SimpleNamespace(drift_rows=None),
            {"MaBERT-forward-causal": cell},
            lambda: ("generated sentences", texts[:3]),
        )
        run_cells([right, left], store)
        results = [json.loads(store.path(made).read_text(encoding="utf-8"))["result"] for made in (right, left)]
        for result, side in zip(results, ("right", "left"), strict=True):
            assert (result["data"], result["rows"], result["side"]) == ("generated sentences", 3, side)
            assert result["pads"] == list(PADS)
            assert list(result["modes"]) == list(MODES)
            assert result["findings"] == findings(result, "forward", "causal", side)
        assert any("no token moves" in line for line in results[0]["findings"])
        assert not any("no token moves" in line for line in results[1]["findings"])
