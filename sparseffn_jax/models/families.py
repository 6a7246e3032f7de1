"""The model families, by the ``model_type`` of their Hugging Face configs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sparseffn_jax.models.decoder import Decoder, DecoderSpec
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.models.gptj import GPTJForCausalLM
from sparseffn_jax.models.llama import LlamaForCausalLM
from sparseffn_jax.models.mistral import MistralForCausalLM

FAMILIES: Mapping[str, type[Decoder]] = MappingProxyType(
    {
        "gpt2": GPT2LMHeadModel,
        "gptj": GPTJForCausalLM,
        "llama": LlamaForCausalLM,
        "mistral": MistralForCausalLM,
    }
)


def family(model_type: Any) -> type[Decoder]:
    """Returns the decoder class of a model family.

    Raises:
      ValueError: if it is not known; the message lists the known ones.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r}: known model families are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def decoder_spec(config: Any) -> DecoderSpec:
    """Returns what a config of any known family says; raises ``ValueError`` as :func:`family`."""
    return family(getattr(config, "model_type", None)).spec_of(config)
