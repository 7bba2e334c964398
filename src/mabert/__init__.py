"""Hybrid Mamba-Transformer encoders, padding-safe by construction."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from mabert.config import MaBertConfig
from mabert.data.mlm import MlmCollator
from mabert.models import MaBertForMaskedLM, MaBertForSequenceClassification, MaBertModel, MaBertPreTrainedModel

AutoConfig.register(MaBertConfig.model_type, MaBertConfig)
AutoModel.register(MaBertConfig, MaBertModel)
AutoModelForMaskedLM.register(MaBertConfig, MaBertForMaskedLM)
AutoModelForSequenceClassification.register(MaBertConfig, MaBertForSequenceClassification)

__all__ = [
    "MaBertConfig",
    "MaBertForMaskedLM",
    "MaBertForSequenceClassification",
    "MaBertModel",
    "MaBertPreTrainedModel",
    "MlmCollator",
]
