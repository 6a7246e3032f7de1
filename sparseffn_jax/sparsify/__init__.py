"""Dense FFNs in, SparseFFNs out: closed forms first, then distillation layer by layer."""
