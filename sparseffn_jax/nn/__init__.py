"""Flax Linen layers: the SparseFFN, attention, rotary embeddings and LoRA."""
