"""Sparsifies a GPT-J: by a budget of FLOPs, with adapters on what is too large to train in full.

    python examples/gptj.py                             # a tiny random model, offline
    python examples/gptj.py --model EleutherAI/gpt-j-6b --text my_corpus/ --window 1024 --out sparse

Attention and FFN of a layer read the same LayerNorm side by side: what the new FFN does otherwise
is first seen by the next layer, and the adapters let its attention answer.
"""

from collections.abc import Sequence

import common
from transformers import GPTJConfig

import sparseffn_jax as sf


def design(spec: sf.DecoderSpec) -> sf.SparseFFNConfig:
    """Half of the dense FFN's FLOPs, shared out by the library."""
    return sf.size_ffn(spec.d_model, spec.d_ff, 0.5, spec.activation)


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads, sparsifies, fine-tunes FFNs and adapters and generates."""
    # Rotary positions turn half of the channels of a head.
    stand_in = sf.GPTJForCausalLM(GPTJConfig(**common.TINY, rotary_dim=8))
    common.run(common.parse(__doc__, arguments), stand_in, design, recipe="lora")


if __name__ == "__main__":
    main()
