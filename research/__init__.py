"""Pretraining and fine-tuning of large transformer models in JAX."""
