"""Models that transformers can load, train and serve."""

from mabert.models.encoder import MaBertForMaskedLM, MaBertForSequenceClassification, MaBertModel, MaBertPreTrainedModel

__all__ = ["MaBertForMaskedLM", "MaBertForSequenceClassification", "MaBertModel", "MaBertPreTrainedModel"]
