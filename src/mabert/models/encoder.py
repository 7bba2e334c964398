"""MaBERT: the encoder and its heads, as transformers models.

Shape suffixes: B batch, L length, T real tokens in all, S sequences, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from mabert.config import MaBertConfig
from mabert.layers.embeddings import Embeddings
from mabert.layers.mamba import MambaLayer
from mabert.layers.padding import PSM, zero_pads
from mabert.layers.parallel import ParallelLayer
from mabert.layers.pooling import Pooling
from mabert.layers.transformer import TransformerLayer
from mabert.models.init import init_module
from mabert.models.inputs import IGNORED, check_token_labels, given_tokens
from mabert.ops import SequenceLayout


class MaBertPreTrainedModel(PreTrainedModel):
    """What every MaBERT model shares: configuration class, initial values, abilities."""

    config_class = MaBertConfig
    config: MaBertConfig
    base_model_prefix = "mabert"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the heads divide by num_items_in_batch: without this the Trainer would not give it
    _no_split_modules = ["Embeddings", "MambaLayer", "ParallelLayer", "TransformerLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_proj.bias"]  # noqa: RUF012

    def __init__(self, config: MaBertConfig):
        super().__init__(config)
        config.check()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config)


class MaBertModel(MaBertPreTrainedModel):
    """The encoder: embeddings, the layers of `config.pattern`, a final LayerNorm."""

    def __init__(self, config: MaBertConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            make_layer(config, letter, direction)
            for letter, direction in zip(config.pattern, config.scan_directions(), strict=True)
        )
        # CHOICE: a final LayerNorm, as every Pre-LN stack has
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        assert isinstance(value, nn.Embedding)
        self.embeddings.word_embeddings = value

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Admit sequences of up to that many tokens, stretching learned positions by linear interpolation."""
        self.embeddings.resize_positions(new_num_position_embeddings)
        self.config.max_position_embeddings = new_num_position_embeddings

    def get_position_embeddings(self) -> nn.Embedding:
        """The learned positions.

        Raises:
            ValueError: `position_embedding_type` is not "absolute".
        """
        if self.embeddings.position_embeddings is None:
            kind = self.config.position_embedding_type
            raise ValueError(f"position_embedding_type={kind!r} has no learned positions.")
        return self.embeddings.position_embeddings

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, SequenceLayout, tuple[Tensor, ...] | None]:
        """Run the encoder without leaving its execution; what the heads build on. For the inputs see `forward`.

        Returns:
            The final LayerNorm's output, (T, H) packed or (B, L, H) padded with pads as they come; the layout; and
            the hidden states (B, L, H) before each layer and after the last one, when asked for.
        """
        _check_packed_arguments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if output_attentions:
            raise ValueError("output_attentions is not supported: M layers have no attention weights.")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        layout = self._layout(input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        x = self.embeddings(input_ids, inputs_embeds, token_type_ids, layout)
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(_rows(x, layout))
            x = layer(x, layout)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(_rows(self._finish(x, layout), layout))
        return x, layout, tuple(hidden_states) if hidden_states is not None else None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids; or inputs_embeds: (B, L, H).
            attention_mask: (B, L), non-zero at real tokens. Packed execution takes any layout, padded execution pads
                on either side.
            token_type_ids: (B, L) segments, 0 when None.
            position_ids: (B, L); by default a token's index among its own sequence's real tokens.
            seq_idx: (B, L), the sequence of each token within its row, negative at pads: several sequences in a row.
            cu_seq_lens_q: (S+1,), the same for one row as boundaries; cu_seq_lens_k, max_length_q and max_length_k may
                come beside it, as transformers' flattening collator gives them, and must agree.

        Returns:
            last_hidden_state (B, L, H); zero at pads when packed, and for psm "post", "pre+post" and "exact".

        Raises:
            ValueError: the inputs disagree, or a sequence is longer than `max_position_embeddings`.
        """
        x, layout, hidden_states = self.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            seq_idx,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            output_hidden_states,
            output_attentions,
        )
        return BaseModelOutput(
            last_hidden_state=_rows(self._finish(x, layout), layout),
            hidden_states=hidden_states,
        )

    def _finish(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        return zero_pads(x, layout) if PSM[self.config.psm].after_block else x

    def _layout(self, input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, cu_seq_lens) -> SequenceLayout:
        given = given_tokens(input_ids, inputs_embeds)
        if input_ids is not None and attention_mask is None and seq_idx is None and cu_seq_lens is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        packed = self.config.execution == "packed"
        layout = SequenceLayout.build(
            given.shape[0],
            given.shape[1],
            given.device,
            packed=packed,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens,
        )
        longest = self.config.max_position_embeddings
        if not torch.compiler.is_compiling() and layout.max_length > longest:
            raise ValueError(
                f"A sequence has {layout.max_length} tokens, but max_position_embeddings is {longest}. Truncate it, or "
                f"call resize_position_embeddings({layout.max_length}) on the encoder."
            )
        if not packed and not torch.compiler.is_compiling() and layout.has_interior_pads():
            raise ValueError(
                "attention_mask has pads between real tokens of a row, which execution='padded' cannot pass over "
                "exactly. Use execution='packed', or move the pads to the ends."
            )
        if position_ids is not None:
            layout = layout.at_positions(position_ids, told_apart=seq_idx is not None or cu_seq_lens is not None)
            if self.config.position_embedding_type == "absolute" and not torch.compiler.is_compiling():
                real = layout.positions if packed else layout.unpad(layout.positions)
                if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < longest:
                    raise ValueError(f"position_ids must lie in 0 to {longest - 1} (max_position_embeddings - 1).")
        return layout


def make_layer(config: MaBertConfig, letter: str, direction: str | None) -> nn.Module:
    """The layer that a letter of the pattern stands for, with the direction of its scan where it has one."""
    if direction is None:
        return TransformerLayer(config)
    return MambaLayer(config, direction) if letter == "M" else ParallelLayer(config, direction)


class MaBertMLMHead(nn.Module):
    """Dense, activation, LayerNorm, decoder tied to the token embeddings."""

    def __init__(self, config: MaBertConfig):
        super().__init__()
        # CHOICE: BERT's prediction head
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to logits (..., V)."""
        return self.decoder(self.norm(self.activation(self.dense(x))))


class MaBertForMaskedLM(MaBertPreTrainedModel):
    """MaBERT with a masked-language-modelling head."""

    _tied_weights_keys = {"head.decoder.weight": "mabert.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MaBertConfig):
        super().__init__(config)
        self.mabert = MaBertModel(config)
        self.head = MaBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder."""
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the decoder."""
        self.head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        labelled_only: bool | None = None,
    ) -> MaskedLMOutput:
        """Predict masked tokens. For the inputs see `MaBertModel.forward`.

        Args:
            labels: (B, L), the token to predict, -100 where there is none.
            num_items_in_batch: labels of the whole (accumulated) batch; the loss is then their share of its mean,
                sum / num_items_in_batch, otherwise the mean over this batch's labels.
            labelled_only: compute logits at labelled positions only; by default while training.

        Returns:
            loss; logits (labels, V) in row order when labelled_only, else (B, L, V), zero at pads.

        Raises:
            ValueError: the labels are of another shape than the tokens, or no integers, or one of them is outside the
                vocabulary or stands at a pad.
        """
        x, layout, hidden_states = self.mabert.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            seq_idx,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            output_hidden_states,
            output_attentions,
        )
        x_TH = x if layout.packed else layout.unpad(x)
        loss = None
        if labels is None:
            logits = layout.repad(self.head(x_TH))
        else:
            check_token_labels(labels, layout)
            labels_T = layout.unpad(labels.to(x.device))
            labelled = (labels_T != IGNORED).nonzero().squeeze(1)
            targets = labels_T[labelled]
            _check_labels(targets, self.config.vocab_size)
            _check_no_label_at_pads(labels, len(targets), layout)
            if labelled_only or (labelled_only is None and self.training):
                logits = self.head(x_TH[labelled])
                at_labels = logits
            else:
                logits_TV = self.head(x_TH)
                logits, at_labels = layout.repad(logits_TV), logits_TV[labelled]
            total = F.cross_entropy(at_labels.float(), targets, reduction="sum")
            loss = total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=hidden_states)


class MaBertForSequenceClassification(MaBertPreTrainedModel):
    """MaBERT with pooling and a linear classifier or regressor."""

    def __init__(self, config: MaBertConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.mabert = MaBertModel(config)
        self.pooling = Pooling(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Classify or rate sequences. For the inputs see `MaBertModel.forward`.

        Args:
            labels: (S,) classes; (S,) or (S, labels) numbers for regression; (S, labels) of 0 and 1 for multi-label
                classification. S is B, or the number of sequences when several lie in a row.
            num_items_in_batch: label entries of the whole (accumulated) batch; see `MaBertForMaskedLM.forward`.

        Returns:
            loss (cross entropy, squared error or binary cross entropy, by `config.problem_type`); logits (S, labels).

        Raises:
            ValueError: labels are out of range or their number is not that of the sequences.
        """
        x, layout, hidden_states = self.mabert.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            seq_idx,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            output_hidden_states,
            output_attentions,
        )
        # PAPER Eq. 14: logits = W_c v + b_c
        logits = self.classifier(self.dropout(self.pooling(x, layout)))
        loss = None if labels is None else self._loss(logits, labels.to(logits.device), num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if len(labels) != len(logits):
            raise ValueError(f"There are {len(logits)} sequences, but {len(labels)} labels.")
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            else:
                integers = not torch.is_floating_point(labels)
                self.config.problem_type = "single_label_classification" if integers else "multi_label_classification"
        if self.config.problem_type == "single_label_classification":
            _check_labels(labels, self.num_labels)
            total = F.cross_entropy(logits.float(), labels.view(-1), reduction="sum")
        elif self.config.problem_type == "regression":
            total = F.mse_loss(logits.float(), labels.view_as(logits).float(), reduction="sum")
        else:
            total = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


def _rows(x: Tensor, layout: SequenceLayout) -> Tensor:
    """(T, H) packed or (B, L, H) padded, to (B, L, H)."""
    return layout.repad(x) if layout.packed else x


def _check_labels(labels: Tensor, classes: int) -> None:
    if not torch.compiler.is_compiling() and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels must lie in 0 to {classes - 1}, but they reach from {low} to {high}.")


def _check_no_label_at_pads(labels: Tensor, at_tokens: int, layout: SequenceLayout) -> None:
    if torch.compiler.is_compiling() or layout.mask_BL is None:
        return
    if int((labels != IGNORED).sum()) != at_tokens:
        raise ValueError("labels hold tokens to predict at pads. Set them to -100 there.")


def _check_packed_arguments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k) -> None:
    if torch.compiler.is_compiling():
        return
    if cu_seq_lens_k is not None and (cu_seq_lens_q is None or not torch.equal(cu_seq_lens_q, cu_seq_lens_k)):
        raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q: the encoder attends within each sequence.")
    for name, given in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        if given is not None and (cu_seq_lens_q is None or int(cu_seq_lens_q.diff().max()) > int(given)):
            raise ValueError(f"{name}={given} disagrees with cu_seq_lens_q.")
