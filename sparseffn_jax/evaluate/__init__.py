"""Evaluation of models: losses, perplexity and log-probabilities."""
