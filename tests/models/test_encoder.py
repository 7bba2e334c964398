import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from mabert import MaBertConfig, MaBertForMaskedLM, MaBertForSequenceClassification, MaBertModel
from mabert.config import FUSIONS
from mabert.ops import SequenceLayout


def small(**overrides):
    return MaBertConfig(
        **{"vocab_size": 80, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "pattern": "MMT",
           "state_size": 4, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
           "attention_probs_dropout_prob": 0.0} | overrides
    )  # fmt: skip


def batch(rows=4, length=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 80, (rows, length), generator=g)
    labels = ids.where(torch.rand(rows, length, generator=g) < 0.3, -100)
    return ids, labels


class TestOptionsChangeBehaviour:
    """Every option of the configuration changes the output or the parameters."""

    CHANGES = (
        {"scan_direction": "backward"},
        {"scan_direction": "alternating"},
        {"scan_direction": "bidirectional"},
        {"conv_mode": "causal"},
        {"conv_kernel": 3},
        {"state_size": 8},
        {"expand": 1},
        {"time_step_rank": 5},
        {"pattern": "MTM"},
        {"pattern": "PMT"},
        {"hidden_act": "relu"},
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "none"},
        {"layer_norm_eps": 0.1},
        {"num_attention_heads": 4},
        {"type_vocab_size": 3},
        {"tie_word_embeddings": False},
    )

    PARALLEL_CHANGES = (
        {"scan_direction": "backward"},
        {"scan_direction": "alternating"},
        {"scan_direction": "bidirectional"},
        {"conv_mode": "causal"},
        {"position_embedding_type": "rope"},
        *({"fusion": fusion} for fusion in FUSIONS if fusion != "mean"),
    )

    @pytest.mark.parametrize(
        ("pattern", "change"),
        [*(("MMT", change) for change in CHANGES), *(("PP", change) for change in PARALLEL_CHANGES)],
        ids=str,
    )
    def test_option(self, pattern, change):
        ids, _ = batch()
        outcomes = []
        for overrides in ({}, change):
            torch.manual_seed(0)
            choices = {"pattern": pattern, "initializer_range": 0.2}
            model = MaBertForMaskedLM(small(**choices | overrides)).eval()
            with torch.no_grad():
                shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
                outcomes.append((shapes, model(ids).logits))
        same_shapes = outcomes[0][0] == outcomes[1][0]
        assert not same_shapes or (outcomes[0][1] - outcomes[1][1]).abs().max() > 1e-4

    @pytest.mark.parametrize("pattern", ["MMT", "P"])
    def test_dropouts_act_in_training_only_and_each_by_its_own_option(self, pattern):
        ids, _ = batch()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            model = MaBertModel(small(pattern=pattern, **{name: 0.5})).train()
            assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state), name
            model.eval()
            assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
        classifier = MaBertForSequenceClassification(small(classifier_dropout=0.5)).train()
        assert not torch.equal(classifier(ids).logits, classifier(ids).logits)

    @pytest.mark.parametrize("letter", ["M", "T", "P"])
    @pytest.mark.parametrize(("branch", "other"), [("mixer", "ffn"), ("ffn", "mixer")])
    def test_dropout_is_on_both_branches_of_every_layer(self, letter, branch, other):
        """Where the other branch adds nothing, what is dropped stays as it was."""
        config = small(pattern=letter, hidden_dropout_prob=0.5, initializer_range=0.2)
        layer = MaBertModel(config).train().layers[0]
        getattr(layer, other).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        x = torch.randn(100, 32)
        unchanged = layer(x, SequenceLayout.build(1, 100, "cpu", packed=True)) == x
        assert 0.4 < unchanged.float().mean() < 0.6, branch

    def test_rope_theta_is_read(self):
        ids, _ = batch()
        outputs = []
        for theta in (10.0, 10000.0):
            torch.manual_seed(0)
            parameters = {"rope_type": "default", "rope_theta": theta}
            config = small(position_embedding_type="rope", rope_parameters=parameters, initializer_range=0.3)
            outputs.append(MaBertModel(config).eval()(ids).last_hidden_state)
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3

    def test_pooling_options_differ(self):
        ids, _ = batch()
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        logits = {}
        for pooling in ("map", "attention", "cls", "mean"):
            torch.manual_seed(0)
            model = MaBertForSequenceClassification(small(execution="padded", psm="pre+post", pooling=pooling))
            if model.pooling.scorer is not None:
                torch.nn.init.ones_(model.pooling.scorer.weight[:, :5])
            torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
            logits[pooling] = model.eval()(ids, attention_mask=mask).logits
        for a, b in itertools.combinations(logits, 2):
            assert (logits[a][0] - logits[b][0]).abs().max() > 1e-5, (a, b)
        torch.testing.assert_close(logits["map"][1:], logits["attention"][1:])  # rows without pads


class TestInputs:
    def test_token_types_positions_and_embeddings_are_used(self):
        model = MaBertModel(small()).eval()
        ids, _ = batch()
        plain = model(ids).last_hidden_state
        torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state, plain)
        torch.testing.assert_close(model(ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state, plain)
        assert (model(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state - plain).abs().max() > 1e-3
        positions = torch.arange(12)[None]
        torch.testing.assert_close(model(ids, position_ids=positions).last_hidden_state, plain)
        assert (model(ids, position_ids=positions + 5).last_hidden_state - plain).abs().max() > 1e-3

    @pytest.mark.parametrize("execution", ["packed", "padded"])
    def test_hidden_states(self, execution):
        model = MaBertModel(small(execution=execution)).eval()
        ids, _ = batch()
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        assert len(out.hidden_states) == 4
        assert all(h.shape == (4, 12, 32) for h in out.hidden_states)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert model(ids).hidden_states is None
        assert isinstance(model(ids, return_dict=False), tuple)

    def test_batch_of_one_equals_batch_of_many(self):
        model = MaBertModel(small()).eval()
        ids, _ = batch()
        together = model(ids).last_hidden_state
        for row, expected in zip(ids, together, strict=True):
            torch.testing.assert_close(model(row[None]).last_hidden_state[0], expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "exactly one of input_ids and inputs_embeds"),
            ({"input_ids": torch.ones(5).long()}, r"input_ids must have shape \(B, L\) with .*, not \(5,\)"),
            ({"input_ids": torch.ones(2, 0).long()}, r"at least one token, not \(2, 0\)"),
            ({"inputs_embeds": torch.ones(3, 32)}, r"inputs_embeds must have shape \(B, L, H\)"),
            ({"input_ids": torch.ones(1, 25).long()}, r"25 tokens, but max_position_embeddings is 24.*resize"),
            ({"input_ids": torch.ones(1, 3).long(), "position_ids": torch.tensor([[0, 1, 24]])}, "lie in 0 to 23"),
            (
                {"input_ids": torch.ones(1, 3).long(), "position_ids": torch.tensor([[0, 1, 0]])},
                "position_ids begin anew within a row.*seq_idx or cu_seq_lens_q",
            ),
            ({"input_ids": torch.ones(1, 3).long(), "output_attentions": True}, "no attention weights"),
            (
                {"input_ids": torch.ones(1, 3).long(), "cu_seq_lens_k": torch.tensor([0, 3])},
                "cu_seq_lens_k must equal cu_seq_lens_q",
            ),
            (
                {"input_ids": torch.ones(1, 3).long(), "cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 2},
                "max_length_q=2 disagrees",
            ),
        ],
    )
    def test_wrong_input_is_refused(self, inputs, message):
        with pytest.raises(ValueError, match=message):
            MaBertModel(small())(**inputs)

    def test_pads_without_a_mask_are_remarked_on(self, monkeypatch):
        warnings = []
        monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", warnings.append)
        model = MaBertModel(small())
        ids = torch.tensor([[5, 6, 0]])
        model(ids, attention_mask=torch.tensor([[1, 1, 0]]))
        model(ids + 1)
        assert not warnings
        model(ids)
        assert "attention_mask" in warnings[0]

    def test_pads_beyond_the_maximum_are_no_tokens(self):
        ids = torch.ones(1, 40, dtype=torch.long)
        mask = (torch.arange(40) < 20).long()[None]
        assert MaBertModel(small())(ids, attention_mask=mask).last_hidden_state.shape == (1, 40, 32)


class TestPositions:
    def test_resizing_stretches_the_table_and_admits_longer_input(self):
        model = MaBertForMaskedLM(small())
        old = model.mabert.get_position_embeddings().weight.detach().clone()
        model.mabert.resize_position_embeddings(93)  # 4 new steps for each of 23 old ones
        new = model.mabert.get_position_embeddings().weight
        torch.testing.assert_close(new[::4], old)
        torch.testing.assert_close(new[2], (old[0] + old[1]) / 2)
        assert new.requires_grad
        assert model.config.max_position_embeddings == 93
        assert model(torch.ones(1, 93).long()).logits.shape == (1, 93, 80)

    def test_a_resized_model_survives_saving(self, tmp_path):
        model = MaBertModel(small()).eval()
        model.resize_position_embeddings(50)
        model.save_pretrained(tmp_path)
        ids = torch.randint(1, 80, (1, 50))
        loaded = MaBertModel.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(ids).last_hidden_state, model(ids).last_hidden_state)

    @pytest.mark.parametrize("kind", ["rope", "none"])
    def test_without_a_table_only_the_limit_moves(self, kind):
        model = MaBertModel(small(position_embedding_type=kind))
        model.resize_position_embeddings(50)
        assert model(torch.ones(1, 50).long()).last_hidden_state.shape == (1, 50, 32)
        with pytest.raises(ValueError, match="no learned positions"):
            model.get_position_embeddings()


class TestMaskedLM:
    def test_training_computes_logits_at_labels_only_with_the_same_loss(self):
        model = MaBertForMaskedLM(small())
        ids, labels = batch()
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        labels = labels.masked_fill(mask == 0, -100)
        training = model.train()(ids, attention_mask=mask, labels=labels)
        evaluation = model.eval()(ids, attention_mask=mask, labels=labels)
        n = int((labels != -100).sum())
        assert training.logits.shape == (n, 80)
        assert evaluation.logits.shape == (4, 12, 80)
        torch.testing.assert_close(training.logits, evaluation.logits[labels != -100])
        torch.testing.assert_close(training.loss, evaluation.loss)
        torch.testing.assert_close(
            training.loss, torch.nn.functional.cross_entropy(evaluation.logits[labels != -100], labels[labels != -100])
        )
        assert model(ids, labels=labels, labelled_only=True).logits.dim() == 2
        assert (evaluation.logits[mask == 0] == 0).all()

    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_accumulated_gradients_equal_those_of_the_whole_batch(self, parts):
        model = MaBertForMaskedLM(small()).train()
        ids, labels = batch(rows=8)
        items = int((labels != -100).sum())

        def gradients(pieces):
            model.zero_grad()
            for i, y in zip(ids.chunk(pieces), labels.chunk(pieces), strict=True):
                model(i, labels=y, num_items_in_batch=items).loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters()}

        whole = gradients(1)
        for name, g in gradients(parts).items():
            assert (g - whole[name]).norm() <= 1e-5 * whole[name].norm() + 1e-9, name

    def test_a_batch_without_labels_has_loss_zero(self):
        model = MaBertForMaskedLM(small()).train()
        ids, _ = batch()
        loss = model(ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        assert loss.item() == 0

    @pytest.mark.parametrize("labels", [torch.ones(4, 11).long(), torch.ones(4, 12)], ids=["shape", "dtype"])
    def test_labels_that_are_not_one_for_each_token_are_refused(self, labels):
        with pytest.raises(ValueError, match=r"labels must be integers of shape \(4, 12\), one for each token"):
            MaBertForMaskedLM(small())(batch()[0], labels=labels)

    @pytest.mark.parametrize(
        ("label", "message"), [(80, "labels must lie in 0 to 79"), (-1, "labels must lie in 0 to 79")]
    )
    def test_labels_outside_the_vocabulary_are_refused(self, label, message):
        ids, labels = batch()
        labels[0, 0] = label
        with pytest.raises(ValueError, match=message):
            MaBertForMaskedLM(small())(ids, labels=labels)

    @pytest.mark.parametrize("execution", ["packed", "padded"])
    def test_labels_at_pads_are_refused(self, execution):
        ids, _ = batch()
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        with pytest.raises(ValueError, match="at pads"):
            MaBertForMaskedLM(small(execution=execution))(ids, attention_mask=mask, labels=ids)

    def test_decoder_is_tied_and_follows_a_resized_vocabulary(self):
        model = MaBertForMaskedLM(small())
        assert model.head.decoder.weight is model.mabert.embeddings.word_embeddings.weight
        model.resize_token_embeddings(90)
        assert model.head.decoder.weight is model.mabert.embeddings.word_embeddings.weight
        assert model(batch()[0]).logits.shape[-1] == 90


class TestSequenceClassification:
    def test_problem_types(self):
        ids, _ = batch()
        cases = {
            "single_label_classification": (3, torch.tensor([0, 2, 1, 1])),
            "regression": (1, torch.tensor([0.1, 2.0, -1.0, 0.5])),
            "multi_label_classification": (3, torch.rand(4, 3).round()),
        }
        for kind, (labels_count, labels) in cases.items():
            model = MaBertForSequenceClassification(small(num_labels=labels_count)).eval()
            out = model(ids, labels=labels)
            assert model.config.problem_type == kind
            assert out.logits.shape == (4, labels_count)
            expected = {
                "single_label_classification": torch.nn.functional.cross_entropy,
                "regression": lambda x, y: torch.nn.functional.mse_loss(x.squeeze(1), y),
                "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
            }[kind](out.logits, labels)
            torch.testing.assert_close(out.loss, expected)
            half = model(ids, labels=labels, num_items_in_batch=2 * labels.numel()).loss
            torch.testing.assert_close(half, out.loss / 2)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 1, 2, 3]), "labels must lie in 0 to 2, but they reach from 0 to 3"),
            (torch.tensor([0, 1]), "4 sequences, but 2 labels"),
        ],
    )
    def test_wrong_labels_are_refused(self, labels, message):
        with pytest.raises(ValueError, match=message):
            MaBertForSequenceClassification(small(num_labels=3))(batch()[0], labels=labels)


class TestTransformersCitizen:
    @pytest.mark.parametrize(
        ("auto", "model_class"),
        [
            (AutoModel, MaBertModel),
            (AutoModelForMaskedLM, MaBertForMaskedLM),
            (AutoModelForSequenceClassification, MaBertForSequenceClassification),
        ],
    )
    def test_saved_models_come_back_through_the_auto_classes(self, auto, model_class, tmp_path):
        torch.manual_seed(0)
        model = model_class(small(scan_direction="bidirectional", num_labels=3)).eval()
        model.save_pretrained(tmp_path)
        assert isinstance(AutoConfig.from_pretrained(tmp_path), MaBertConfig)
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids, _ = batch()
        assert torch.equal(loaded(ids)[0], model(ids)[0])

    def test_a_checkpoint_of_another_size_is_refused(self, tmp_path):
        MaBertModel(small()).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            MaBertModel.from_pretrained(tmp_path, intermediate_size=64)

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is not in 5.17
    @pytest.mark.parametrize("execution", ["packed", "padded"])
    def test_gradient_checkpointing_changes_no_gradient(self, execution):
        model = MaBertForMaskedLM(small(hidden_dropout_prob=0.1, execution=execution)).train()
        ids, labels = batch()

        def gradients():
            model.zero_grad()
            torch.manual_seed(1)
            model(ids, labels=labels).loss.backward()
            return [p.grad.clone() for p in model.parameters()]

        expected = gradients()
        model.gradient_checkpointing_enable()
        calls = []
        for layer in model.mabert.layers:
            layer.mixer.register_forward_hook(lambda *a: calls.append(1))
        actual = gradients()
        assert len(calls) == 6  # each layer ran twice
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)

    def test_scores_are_materialised_in_eager_attention_only(self):
        ids, _ = batch(rows=1, length=24)
        seen = {}
        for attention in ("sdpa", "eager"):
            model = MaBertModel(small(pattern="T", attn_implementation=attention))
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.shape[-2:]) or t, lambda t: t):
                model(ids)
            seen[attention] = (24, 24) in sizes
        assert seen == {"sdpa": False, "eager": True}

    def test_a_plain_trainer_trains_it_on_padded_batches(self, tmp_path):
        from transformers import Trainer, TrainingArguments

        torch.manual_seed(0)
        g = torch.Generator().manual_seed(0)
        rows = []
        for _ in range(64):
            n = int(torch.randint(3, 12, (), generator=g))
            ids = torch.randint(5, 80, (n,), generator=g)
            rows.append({"input_ids": ids, "labels": int(ids[0] > 40)})

        def collate(samples):
            length = max(len(s["input_ids"]) for s in samples)
            ids = torch.stack(
                [torch.nn.functional.pad(s["input_ids"], (0, length - len(s["input_ids"]))) for s in samples]
            )
            return {
                "input_ids": ids,
                "attention_mask": (ids > 0).long(),
                "labels": torch.tensor([s["labels"] for s in samples]),
            }

        trainer = Trainer(
            MaBertForSequenceClassification(small(pooling="cls")),
            TrainingArguments(
                tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=30,
                learning_rate=5e-3, use_cpu=True, report_to=[], logging_steps=5, save_strategy="no", disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=collate,
        )  # fmt: skip
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(0.69, abs=0.15)
        assert losses[-1] < 0.4


@pytest.fixture
def tokenizer_folder(tmp_path):
    from transformers import BertTokenizer

    words = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "log", "good", "bad"]
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("execution", ["packed", "padded"])
class TestPipelines:
    def test_fill_mask(self, tokenizer_folder, execution):
        from transformers import pipeline

        MaBertForMaskedLM(small(execution=execution)).save_pretrained(tokenizer_folder)
        fill = pipeline("fill-mask", model=str(tokenizer_folder), device="cpu")
        results = fill(["the cat [MASK] on a mat", "a [MASK]"], batch_size=2)
        assert all(len(r) == 5 and 0 < r[0]["score"] <= 1 for r in results)
        alone = fill("a [MASK]")
        assert alone[0]["token"] == results[1][0]["token"]
        assert alone[0]["score"] == pytest.approx(results[1][0]["score"], abs=1e-5)

    def test_text_classification(self, tokenizer_folder, execution):
        from transformers import pipeline

        MaBertForSequenceClassification(
            small(execution=execution, num_labels=2, id2label={0: "bad", 1: "good"})
        ).save_pretrained(tokenizer_folder)
        classify = pipeline("text-classification", model=str(tokenizer_folder), device="cpu")
        results = classify(["the cat sat", "a dog ran on the good mat"], batch_size=2)
        assert {r["label"] for r in results} <= {"bad", "good"}
        assert classify("the cat sat")[0]["score"] == pytest.approx(results[0]["score"], abs=1e-5)
