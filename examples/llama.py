"""Sparsifies a LLaMA: gated layers without biases, the first and the last one kept dense.

python examples/llama.py                            # a tiny random model, offline
python examples/llama.py --model TinyLlama/TinyLlama_v1.1 --text my_corpus/ --window 2048
"""

from collections.abc import Sequence
from typing import Any

import common
from transformers import LlamaConfig

import sparseffn_jax as sf


def design(spec: sf.DecoderSpec) -> list[sf.SparseFFNConfig | None]:
    """Sparse between the ends, where errors cost most; ``poly(gate) * up`` as its SwiGLU."""
    between = sf.size_ffn(spec.d_model, spec.d_ff, 0.4, spec.activation, gated=True, bias=False)
    return [None, *[between] * (spec.n_layer - 2), None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads, sparsifies, fine-tunes the sparse FFNs and generates."""
    sizes: dict[str, Any] = common.TINY | {"num_hidden_layers": 4}
    # Four heads share two heads of keys and values.
    config = LlamaConfig(**sizes, intermediate_size=176, num_key_value_heads=2)
    common.run(common.parse(__doc__, arguments), sf.LlamaForCausalLM(config), design)


if __name__ == "__main__":
    main()
