"""The decoders of every model family, and generation with them."""
