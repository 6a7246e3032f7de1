"""Flax Linen modules: the SparseFFN and the decoders that it plugs into."""
