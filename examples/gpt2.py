"""Sparsifies a GPT-2: all three parts in every layer, sized by hand.

python examples/gpt2.py                             # a tiny random model, offline
python examples/gpt2.py --model gpt2 --text my_corpus/ --window 1024 --steps 2000 --out sparse
"""

from collections.abc import Sequence

import common
from transformers import GPT2Config

import sparseffn_jax as sf


def design(spec: sf.DecoderSpec) -> sf.SparseFFNConfig:
    """An eighth of the units stay; a branch of low rank stands for most of the others."""
    return sf.SparseFFNConfig(
        spec.d_model,
        spec.d_ff,
        spec.activation,
        spectral=sf.SpectralConfig("low_rank", width=spec.d_ff * 3 // 4, rank=spec.d_model // 4),
        polynomial=sf.PolynomialConfig(degree=4),
        micro=sf.MicroRefinementConfig(core=sf.CoreConfig(spec.d_ff // 8)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads, sparsifies, fine-tunes every parameter and generates."""
    stand_in = sf.GPT2LMHeadModel(GPT2Config(**common.TINY))
    common.run(common.parse(__doc__, arguments), stand_in, design, recipe="full")


if __name__ == "__main__":
    main()
