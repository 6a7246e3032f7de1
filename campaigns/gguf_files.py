"""Writes GGUF files of small models as llama.cpp's converters do, to test with.

Tensors get their names from the package ``gguf``'s own tables.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

import sparseffn_jax as sf
from sparseffn_jax.checkpoints.layout import to_pytorch
from sparseffn_jax.checkpoints.weights import in_memory

# By model_type.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
# The architectures whose files have the two rows of a rotary pair side by side.
_PAIRED = ("llama", "smollm3")
# Kinds of blocks that gguf reads and does not write: the bytes of one, and where its float16 are.
_RANDOM_BLOCKS = {Kind.Q4_K: (144, (0, 2)), Kind.Q5_K: (176, (0, 2)), Kind.Q6_K: (210, (208,))}
_CONTROL = gguf.TokenType.CONTROL


def write_gguf(
    file: Path,
    config: Any,
    tensors: Mapping[str, np.ndarray],
    kind: Kind = Kind.F32,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> Path:
    """Writes a model.

    Args:
      file: the file.
      config: the config of a model of a family that such files can hold.
      tensors: the parameters, under PyTorch's names and in its layouts.
      kind: how matrices are stored that have whole blocks in their rows; all else is float32.
      tokenizer: its settings, under the format's names without ``tokenizer.``.
      extra: more tensors, under the format's names.
      settings: more settings, or others than the config's, by the format's names after
        ``architecture.``, with ``__`` for dots; ``None`` leaves one out.

    Returns:
      The file.
    """
    architecture = _ARCHITECTURES[config.model_type]
    name = gguf.MODEL_ARCH_NAMES[architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, name)
    values = _settings(config) | {key.replace("__", "."): x for key, x in settings.items()}
    for key, value in values.items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.{key}", value)
    rng = np.random.default_rng(0)
    for theirs, array in tensors.items():
        stem, _, leaf = theirs.rpartition(".")
        array = _converted(theirs, np.asarray(array), config)
        stored = kind if _fits(array, kind) else Kind.F32
        data = _random(array, stored, rng) if stored in _RANDOM_BLOCKS else _quantise(array, stored)
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", data, raw_dtype=stored)
    for theirs, array in (extra or {}).items():
        writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def torch_tensors(model: sf.Decoder, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a parameter tree under PyTorch's names and in its layouts."""
    tensors = to_pytorch(in_memory(params), model.names)
    return {name: np.asarray(tensor.read()) for name, tensor in tensors.items()}


def byte_level(tokens: list[str], merges: list[str], special: int, **settings: Any) -> dict:
    """Returns the settings of a byte-level tokenizer, whose last ``special`` tokens are control."""
    types = [gguf.TokenType.NORMAL] * (len(tokens) - special) + [_CONTROL] * special
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": merges,
        "ggml.bos_token_id": len(tokens) - 1,
        "ggml.eos_token_id": len(tokens) - 1,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }


def _settings(config: Any) -> dict[str, Any]:
    shared = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        width = config.n_inner or 4 * config.n_embd
        return shared | {
            "feed_forward_length": width,
            "attention.layer_norm_epsilon": np.float32(config.layer_norm_epsilon),
        }
    shared |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
    }
    if config.model_type in ("smollm3", "gemma3_text"):
        # Not the format's default.
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        theta = rope.get("full_attention", rope)["rope_theta"]
        shared["rope.freq_base"] = np.float32(theta)
    if config.model_type == "llama":
        shared |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    if config.model_type == "gemma3_text":
        shared["attention.sliding_window"] = config.sliding_window
    if config.model_type in ("qwen3", "gemma3_text"):
        keys = ("attention.key_length", "attention.value_length")
        shared |= dict.fromkeys(keys, config.head_dim)
    if config.model_type == "phi3":
        shared |= {
            "rope.scaling.original_context_length": config.original_max_position_embeddings,
            "attention.sliding_window": config.sliding_window or 0,
        }
    return shared


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float) or hasattr(value, "dtype"):
        writer.add_float32(key, float(value))
    elif isinstance(value, int):
        writer.add_uint32(key, int(value))
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _converted(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """Lays a tensor out as llama.cpp's converter does."""
    if config.model_type == "gpt2":
        return array.T if ".h." in name and name.endswith("weight") else array
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return array + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None or config.model_type not in _PAIRED:
        return array
    # LLaMA's own order: the two halves of a head take turns.
    return np.stack(
        np.split(array.reshape(count, -1, *array.shape[1:]), 2, axis=1), axis=2
    ).reshape(array.shape)


def _fits(array: np.ndarray, kind: Kind) -> bool:
    return array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0


def _quantise(array: np.ndarray, kind: Kind) -> np.ndarray:
    return gguf.quantize(np.ascontiguousarray(array, np.float32), kind)


def _random(array: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Returns random blocks, whose values are of the size of the array's."""
    size, places = _RANDOM_BLOCKS[kind]
    blocks = rng.integers(0, 256, (array.size // 256, size), np.uint8)
    for place in places:
        scale = rng.uniform(0.0001, 0.0002, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(array.shape[0], -1)
