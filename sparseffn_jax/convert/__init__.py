"""Checkpoints in, sparse models out."""
