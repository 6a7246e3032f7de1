"""Knows the model families by the ``model_type`` of their Hugging Face configs.

A family is one subclass of :class:`Decoder`, which says all that this library asks of a family, and
one line that registers it.
"""

import importlib
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.gguf import GGUFLayout
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.models.gptj import GPTJForCausalLM
from sparseffn_jax.models.later import MissingConfigError
from sparseffn_jax.models.llama import LlamaForCausalLM
from sparseffn_jax.models.mistral import MistralForCausalLM
from sparseffn_jax.models.phi3 import Phi3ForCausalLM
from sparseffn_jax.models.qwen2 import Qwen2ForCausalLM

_families: dict[str, type[Decoder]] = {}
FAMILIES: Mapping[str, type[Decoder]] = MappingProxyType(_families)
# Why a family is not there, by its model_type and by its GGUF files' architecture.
_missing = {
    "gemma3": "that is Gemma 3 with images; give the text model, whose model_type is gemma3_text",
}


def register(decoder: type[Decoder]) -> None:
    """Adds a model family, under the ``model_type`` of its config class.

    Raises:
      ValueError: if the class does not say all that :class:`Decoder` asks of a family, or if
        another class has that ``model_type``.
    """
    asked = [name for name, kind in Decoder.__annotations__.items() if _is_class_variable(kind)]
    if missing := [name for name in asked if not hasattr(decoder, name)]:
        raise ValueError(
            f"{decoder.__name__} cannot be registered as a model family: give it the class "
            f"attributes {', '.join(missing)}, which Decoder describes"
        )
    model_type = decoder.config_class.model_type
    known = _families.setdefault(model_type, decoder)
    if known is not decoder:
        raise ValueError(
            f"{decoder.__name__} cannot be registered as model_type={model_type!r}, which is "
            f"{known.__name__}'s: give its config class another model_type"
        )


def family(model_type: Any) -> type[Decoder]:
    """Returns the decoder class of a model family.

    Raises:
      ValueError: if it is not known; the message lists the known ones.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r}: {_why_missing(model_type)}known model families are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def gguf_family(architecture: Any) -> type[Decoder]:
    """Returns the decoder class of the models whose GGUF files have this ``general.architecture``.

    Of families with the same architecture it is the first that was registered.

    Raises:
      ValueError: if it is not known; the message lists the known ones.
    """
    known: dict[str, type[Decoder]] = {}
    for decoder in FAMILIES.values():
        if (layout := gguf_layout(decoder)) is not None:
            for name in layout.architectures:
                known.setdefault(name, decoder)
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"general.architecture={str(architecture)[:80]!r}: {_why_missing(architecture)}known "
            f"architectures of GGUF files are {', '.join(known)}"
        )
    return known[architecture]


def _why_missing(name: Any) -> str:
    return f"{_missing[name]}; " if isinstance(name, str) and name in _missing else ""


def _register_later(module: str, decoder: str, *names: str) -> None:
    """Registers a family that not every version of transformers has.

    Args:
      module: the family's module.
      decoder: the name of its class.
      names: what its configs and its GGUF files call it.
    """
    try:
        register(getattr(importlib.import_module(f"sparseffn_jax.models.{module}"), decoder))
    except MissingConfigError as error:
        _missing.update(dict.fromkeys(names, str(error)))


def gguf_layout(decoder: type[Decoder]) -> GGUFLayout | None:
    """Returns how GGUF files hold the models of a family; ``None`` if there are no such files."""
    # Not what it inherits: a subclass is of another architecture unless it says otherwise.
    return vars(decoder).get("gguf")


def _is_class_variable(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.ClassVar


register(GPT2LMHeadModel)
register(GPTJForCausalLM)
register(LlamaForCausalLM)
register(MistralForCausalLM)
register(Qwen2ForCausalLM)
register(Phi3ForCausalLM)
_register_later("qwen3", "Qwen3ForCausalLM", "qwen3")
_register_later("smollm3", "SmolLM3ForCausalLM", "smollm3")
_register_later("gemma3", "Gemma3ForCausalLM", "gemma3_text", "gemma3")
