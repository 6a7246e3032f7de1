"""Runs the command line, as ``sparseffn`` and as ``python -m sparseffn_jax``."""

from sparseffn_jax.cli import main

if __name__ == "__main__":
    main()
