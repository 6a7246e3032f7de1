"""Pure functions on arrays: the operators of a SparseFFN and the plans that run them."""
