"""Sparsifies a Mistral to a core alone, which Hugging Face then loads as a plain, narrower model.

    python examples/mistral.py --out narrow             # a tiny random model, offline
    python examples/mistral.py --model mistralai/Mistral-7B-v0.1 --text my_corpus/ --out narrow

The folder in --out needs no sparseffn_jax: ``AutoModelForCausalLM.from_pretrained("narrow")``.
"""

from collections.abc import Sequence

import common
from transformers import MistralConfig

import sparseffn_jax as sf


def design(spec: sf.DecoderSpec) -> sf.SparseFFNConfig:
    """The more important half of the units, and nothing beside them."""
    core = sf.MicroRefinementConfig(core=sf.CoreConfig(spec.d_ff // 2))
    return sf.SparseFFNConfig(
        spec.d_model, spec.d_ff, spec.activation, micro=core, gated=True, bias=False
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads, sparsifies, fine-tunes, generates beyond the sliding window and exports."""
    config = MistralConfig(
        **common.TINY, intermediate_size=176, num_key_value_heads=2, sliding_window=16
    )
    common.run(
        common.parse(__doc__, arguments),
        sf.MistralForCausalLM(config),
        design,
        save=sf.export_dense,
    )


if __name__ == "__main__":
    main()
