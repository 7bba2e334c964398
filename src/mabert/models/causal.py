"""Causal language models: TransMamba, and hybrids of attention and SSM by layer, as transformers models.

Shape suffixes: B batch, L length, T real tokens in all, S sequences, H hidden, V vocabulary.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mabert.causal_config import CausalConfig, HybridConfig, TransMambaConfig
from mabert.layers.causal_attention import CausalSelfAttention
from mabert.layers.feed_forward import FeedForward
from mabert.layers.mamba1 import Mamba1Mixer
from mabert.layers.mamba2 import Mamba2Mixer
from mabert.layers.memory import LayerMemory
from mabert.layers.norm import RMSNorm
from mabert.layers.parallel import ParallelMixer, make_fusion
from mabert.layers.transmamba import TransMambaMixer
from mabert.models.cache import CausalCache
from mabert.models.init import init_module
from mabert.models.inputs import IGNORED, check_token_labels, given_tokens
from mabert.ops import SequenceLayout
from mabert.ops.linear_cross_entropy import linear_cross_entropy


class CausalLayer(GradientCheckpointingLayer):
    """Pre-norm residual mixer, or two one after the other, and feed-forward network."""

    def __init__(self, config: CausalConfig, layer: int):
        super().__init__()
        self.mixers = nn.ModuleList(make_mixers(config, layer))
        self.mixer_norms = nn.ModuleList(RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in self.mixers)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_TH: Tensor, layout: SequenceLayout, memory: LayerMemory | None = None) -> Tensor:
        """(T, H) to (T, H)."""
        for norm, mixer in zip(self.mixer_norms, self.mixers, strict=True):
            x_TH = x_TH + self.dropout(mixer(norm(x_TH), layout, memory))
        return x_TH + self.dropout(self.ffn(self.ffn_norm(x_TH)))


def make_mixers(config: CausalConfig, layer: int) -> list[nn.Module]:
    """What mixes the tokens in a layer: one mixer, or two one after the other."""
    if isinstance(config, TransMambaConfig):
        return [TransMambaMixer(config, layer)]
    assert isinstance(config, HybridConfig)

    def attention() -> nn.Module:
        return CausalSelfAttention(config, config.sliding_window)

    def ssm() -> nn.Module:
        return Mamba2Mixer(config) if config.ssm == "mamba2" else Mamba1Mixer(config)

    def parallel() -> nn.Module:
        norm = partial(RMSNorm, eps=config.rms_norm_eps)
        fusion = make_fusion(config.fusion, config, norm, is_causal=True, window=config.sliding_window)
        return ParallelMixer(attention(), ssm(), fusion)

    makers = {"T": [attention], "M": [ssm], "S": [ssm, attention], "A": [attention, ssm], "P": [parallel]}
    return [make() for make in makers[config.pattern[layer]]]


class CausalPreTrainedModel(PreTrainedModel):
    """What every causal model shares: initial values, abilities."""

    config: CausalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["CausalLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias", "dt_proj.bias"]  # noqa: RUF012

    def __init__(self, config: CausalConfig):
        super().__init__(config)
        config.check()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves it to the model to make its cache

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config)


class CausalModel(CausalPreTrainedModel):
    """Token embeddings, the layers, a final norm. Runs on real tokens only, whatever the batch looks like."""

    def __init__(self, config: CausalConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(CausalLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        assert isinstance(value, nn.Embedding)
        self.word_embeddings = value

    def run(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Any = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: CausalCache | None = None,
        output_hidden_states: bool | None = None,
        segments: Tensor | None = None,
        memories: str = "both",
    ) -> tuple[Tensor, SequenceLayout, tuple[Tensor, ...] | None]:
        """Run the layers without leaving packed execution; what the head builds on. For the inputs see `forward`.

        Returns:
            The final norm's output (T, H); the layout; and the hidden states (B, L, H) before each layer and after the
            last one, when asked for.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        layout = self._layout(
            input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q, past_key_values
        )
        layout = confined(layout, segments, memories)
        x = self.word_embeddings(layout.unpad(input_ids)) if input_ids is not None else layout.unpad(inputs_embeds)
        x = self.dropout(x)
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        if past_key_values is not None and isinstance(self.config, TransMambaConfig):
            past_key_values.bind(self.config.layer_transpoints())
        memories_of_layers = [None] * len(self.layers) if past_key_values is None else past_key_values.memories
        for layer, memory in zip(self.layers, memories_of_layers, strict=True):
            if hidden_states is not None:
                hidden_states.append(layout.repad(x))
            x = layer(x, layout, memory)
        x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(layout.repad(x))
        if past_key_values is not None:
            past_key_values.advance(layout)
        return x, layout, tuple(hidden_states) if hidden_states is not None else None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: CausalCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        segments: Tensor | None = None,
        memories: str = "both",
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read a batch, or its next tokens.

        Args:
            input_ids: (B, L) token ids; or inputs_embeds: (B, L, H).
            attention_mask: (B, L), non-zero at real tokens, in any layout; with a cache (B, L so far + L).
            position_ids: (B, L), for rotary positions; by default a token's index among its own sequence's real tokens.
                The TransPoint goes by that index in any case.
            seq_idx: (B, L), the sequence of each token within its row, negative at pads: several sequences in a row.
            cu_seq_lens_q: (S+1,), the same for one row as boundaries.
            past_key_values: what came before, from an earlier output.
            use_cache: remember what came so far, to go on from; by default `config.use_cache`, in training never.
            segments: (B, L) integers, the segment of each token, for probes of a hybrid's memories.
            memories: what crosses from one segment to the next: "both"; "recurrent-only", where attention ends at their
                boundaries; "attention-only", where states and convolutions begin anew there; or "none".

        Returns:
            last_hidden_state (B, L, H), zero at pads; past_key_values.

        Raises:
            ValueError: the inputs disagree.
        """
        check_ignored(kwargs)
        cache = self.cache(past_key_values, use_cache, seq_idx, cu_seq_lens_q, segments)
        x, layout, hidden_states = self.run(
            input_ids, attention_mask, position_ids, inputs_embeds, seq_idx, cu_seq_lens_q, cache, output_hidden_states,
            segments, memories,
        )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=layout.repad(x), past_key_values=cache, hidden_states=hidden_states
        )

    def cache(
        self,
        past_key_values: CausalCache | None,
        use_cache: bool | None,
        seq_idx: Tensor | None,
        cu_seq_lens: Tensor | None,
        segments: Tensor | None,
    ) -> CausalCache | None:
        """The given cache, or a new one where one is wanted."""
        is_packed = not (seq_idx is None and cu_seq_lens is None and segments is None)
        if self.training and self.gradient_checkpointing and (use_cache or past_key_values is not None):
            raise ValueError(
                "Gradient checkpointing reads the tokens twice, which a cache would remember twice: leave the cache "
                "out, or call eval()."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not is_packed
        if past_key_values is None and not use_cache:
            return None
        if is_packed:
            raise ValueError(
                "A cache remembers rows, not several sequences or segments in one: leave those out, or the cache."
            )
        if past_key_values is None:
            return CausalCache(len(self.layers))
        if not isinstance(past_key_values, CausalCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, but this model's layers remember states as "
                "well: give what an earlier output holds, or mabert.models.CausalCache(num_hidden_layers)."
            )
        if len(past_key_values.memories) != len(self.layers):
            raise ValueError(
                f"the cache remembers {len(past_key_values.memories)} layers, but the model has {len(self.layers)}."
            )
        return past_key_values

    def _layout(
        self, input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, cu_seq_lens, cache
    ) -> SequenceLayout:
        given = given_tokens(input_ids, inputs_embeds)
        batch, length = given.shape[:2]
        past = cache.lengths_S if cache is not None else None
        if past is not None:
            if len(past) != batch:
                raise ValueError(f"the cache remembers {len(past)} rows, but the batch has {batch}.")
            if attention_mask is not None and attention_mask.shape != (batch, cache.columns + length):
                raise ValueError(
                    f"with a cache of {cache.columns} columns attention_mask must have shape "
                    f"{(batch, cache.columns + length)}, not {tuple(attention_mask.shape)}."
                )
            attention_mask = None if attention_mask is None else attention_mask[:, -length:]
        elif input_ids is not None and attention_mask is None and seq_idx is None and cu_seq_lens is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        layout = SequenceLayout.build(
            batch,
            length,
            given.device,
            packed=True,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens,
        )
        if past is not None:
            layout = replace(layout, past_S=past, positions=layout.positions + past[layout.sequence_ids_T])
        if position_ids is not None:
            layout = layout.at_positions(position_ids, told_apart=seq_idx is not None or cu_seq_lens is not None)
        return layout


class CausalForLM(CausalPreTrainedModel, GenerationMixin):
    """A causal model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012
    model_class: type[CausalModel] = CausalModel

    def __init__(self, config: CausalConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: CausalCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        labelled_only: bool | None = None,
        segments: Tensor | None = None,
        memories: str = "both",
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict each next token. For the inputs see `CausalModel.forward`.

        Args:
            labels: (B, L), usually the ids themselves, -100 where nothing is to be predicted. Each is predicted from
                the token before it in its sequence; the first token of a sequence, from nothing, is left out.
            logits_to_keep: compute logits of the last so many columns only, 0 for all; or of the columns of these
                indices.
            num_items_in_batch: predictions of the whole (accumulated) batch; the loss is then their share of its mean,
                sum / num_items_in_batch, otherwise the mean over this batch's predictions.
            labelled_only: compute logits only where a label is predicted. By default all are, but while training with
                labels none: the loss is made without holding them.

        Returns:
            loss; logits (B, L or logits_to_keep, V), zero at pads, or (labels, V) in order when labelled_only, or None
            while training with labels; past_key_values.

        Raises:
            ValueError: a label is outside the vocabulary, or the inputs disagree.
        """
        check_ignored(kwargs)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not keeps_all:
            raise ValueError("labels need the logits of all columns: leave logits_to_keep out.")
        cache = self.model.cache(past_key_values, use_cache, seq_idx, cu_seq_lens_q, segments)
        x_TH, layout, hidden_states = self.model.run(
            input_ids, attention_mask, position_ids, inputs_embeds, seq_idx, cu_seq_lens_q, cache, output_hidden_states,
            segments, memories,
        )  # fmt: skip
        loss = logits = None
        all_logits = not (labelled_only or (labelled_only is None and self.training))
        if labels is None or all_logits:
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(layout.repad(x_TH)[:, columns])
        if labels is not None:
            predicting, targets = predictions(labels, layout, self.config.vocab_size)
            if logits is not None:
                total = F.cross_entropy(layout.unpad(logits)[predicting].float(), targets, reduction="sum")
            elif labelled_only or not only_multiplies(self.lm_head):
                logits = self.lm_head(x_TH[predicting])
                total = F.cross_entropy(logits.float(), targets, reduction="sum")
            else:
                total = linear_cross_entropy(x_TH[predicting], self.lm_head.weight, targets)
            loss = total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=hidden_states)


class TransMambaModel(CausalModel):
    """TransMamba without a head."""

    config_class = TransMambaConfig


class TransMambaForCausalLM(CausalForLM):
    """TransMamba: layers pass from attention to SSM at their TransPoints (arXiv 2503.24067)."""

    config_class = TransMambaConfig
    model_class = TransMambaModel


class HybridModel(CausalModel):
    """A hybrid by layer, without a head."""

    config_class = HybridConfig


class HybridForCausalLM(CausalForLM):
    """Layers of attention and SSM, in the order of `config.pattern`."""

    config_class = HybridConfig
    model_class = HybridModel


MEMORIES = {
    "both": {},
    "recurrent-only": {"attention": True},
    "attention-only": {"recurrence": True},
    "none": {"attention": True, "recurrence": True},
}
"""What a probe confines to segments, so that only the rest crosses their boundaries."""


def confined(layout: SequenceLayout, segments_BL: Tensor | None, memories: str) -> SequenceLayout:
    """The layout by which only these memories cross from segment to segment.

    Raises:
        ValueError: there is no such choice, or one of the two arguments lacks the other.
    """
    if memories not in MEMORIES:
        raise ValueError(f"memories={memories!r} is not one of {', '.join(map(repr, MEMORIES))}.")
    if memories == "both" and segments_BL is None:
        return layout
    if memories == "both" or segments_BL is None:
        raise ValueError(f"memories={memories!r} and segments go together: a probe needs what to confine, and to what.")
    return layout.confined(segments_BL, **MEMORIES[memories])


def only_multiplies(head: nn.Module) -> bool:
    """Whether a head is its weight and nothing else, as an adapter's is not."""
    return type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks


def predictions(labels_BL: Tensor, layout: SequenceLayout, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Indices among the T tokens of those that predict a label, and what they predict.

    Raises:
        ValueError: the labels are of another shape than the tokens, or no integers, or outside the vocabulary.
    """
    check_token_labels(labels_BL, layout)
    labels_T, ids_T = layout.unpad(labels_BL.to(layout.cu_seqlens.device)), layout.sequence_ids_T
    is_next_T = F.pad((ids_T[1:] == ids_T[:-1]) & (labels_T[1:] != IGNORED), (0, 1))[: len(ids_T)]
    predicting = is_next_T.nonzero().squeeze(1)
    targets = labels_T[predicting + 1]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise ValueError(
            f"labels must lie in 0 to {vocab_size - 1} (vocab_size - 1), or be {IGNORED} where nothing is predicted."
        )
    return predicting, targets


def check_ignored(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would have an effect elsewhere and have none here.

    transformers hands over many that mean nothing to a model like this (token types, what a collator adds).

    Raises:
        ValueError: attention weights are asked for, or a cache comes by another name.
    """
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions is not supported: SSM layers have no attention weights.")
    for name in ("cache", "cache_params"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported: give what an earlier output holds as past_key_values.")
