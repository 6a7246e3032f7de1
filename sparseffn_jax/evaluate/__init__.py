"""What a model is worth: losses, perplexity and log-probabilities."""
