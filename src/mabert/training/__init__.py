"""Training runs: pretraining, fine-tuning, and what they share."""
