"""Hybrid Mamba-Transformer encoders, padding-safe by construction, and their causal kin."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from mabert.causal_config import HybridConfig, TransMambaConfig
from mabert.config import MaBertConfig
from mabert.data.mlm import MlmCollator
from mabert.models import (
    HybridForCausalLM,
    HybridModel,
    MaBertForMaskedLM,
    MaBertForSequenceClassification,
    MaBertModel,
    MaBertPreTrainedModel,
    TransMambaForCausalLM,
    TransMambaModel,
)

AutoConfig.register(MaBertConfig.model_type, MaBertConfig)
AutoModel.register(MaBertConfig, MaBertModel)
AutoModelForMaskedLM.register(MaBertConfig, MaBertForMaskedLM)
AutoModelForSequenceClassification.register(MaBertConfig, MaBertForSequenceClassification)
AutoConfig.register(TransMambaConfig.model_type, TransMambaConfig)
AutoModel.register(TransMambaConfig, TransMambaModel)
AutoModelForCausalLM.register(TransMambaConfig, TransMambaForCausalLM)
AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModel.register(HybridConfig, HybridModel)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)

__all__ = [
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "MaBertConfig",
    "MaBertForMaskedLM",
    "MaBertForSequenceClassification",
    "MaBertModel",
    "MaBertPreTrainedModel",
    "MlmCollator",
    "TransMambaConfig",
    "TransMambaForCausalLM",
    "TransMambaModel",
]
