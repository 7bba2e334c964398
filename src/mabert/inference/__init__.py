"""Using a model folder: sentence vectors, predictions, filled masks."""
