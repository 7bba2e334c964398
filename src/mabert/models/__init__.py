"""Models that transformers can load, train and serve."""

from mabert.models.cache import CausalCache
from mabert.models.causal import HybridForCausalLM, HybridModel, TransMambaForCausalLM, TransMambaModel
from mabert.models.encoder import MaBertForMaskedLM, MaBertForSequenceClassification, MaBertModel, MaBertPreTrainedModel

__all__ = [
    "CausalCache",
    "HybridForCausalLM",
    "HybridModel",
    "MaBertForMaskedLM",
    "MaBertForSequenceClassification",
    "MaBertModel",
    "MaBertPreTrainedModel",
    "TransMambaForCausalLM",
    "TransMambaModel",
]
