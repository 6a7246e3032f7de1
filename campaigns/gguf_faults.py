"""Valid GGUF files and the faults that the fuzzer of loaders puts into them."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf_files import byte_level, torch_tensors, write_gguf
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

import sparseffn_jax as sf

NAME = "model.gguf"
_HUGE = (2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 100_000, 1_000_000)
_SMALL = (0, 1, 2, 3, 7, 8, 9, 12, 13, 32, 97, 255)
LONG_FACTORS, SHORT_FACTORS = [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.5, 1.5]
_FORMATS = {1: "<B", 4: "<I", 8: "<Q"}
Files = dict[str, bytes]


def newer_configs() -> tuple[Gemma3TextConfig, Phi3Config]:
    """Returns configs of tiny models with windows by layer, and with fused weights and LongRoPE."""
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
        "bos_token_id": 96, "eos_token_id": 96, "pad_token_id": 0,
    }  # fmt: skip
    scaling = {"type": "longrope", "long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    long = sizes | {"original_max_position_embeddings": 8, "rope_scaling": scaling}
    return Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4), Phi3Config(**long)


def make_seeds(folder: Path) -> dict[str, Files]:
    """Returns valid files: five architectures, three kinds of numbers, two kinds of tokenizers."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 96, "eos_token_id": 96}
    llama = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, **sizes,
    )  # fmt: skip
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, **sizes)
    words = ["a", "b", "ab", *(f"w{i}" for i in range(93)), "<|end|>"]
    bpe = byte_level(words, ["a b"], 1, ggml__add_bos_token=True, chat_template="{{ messages }}")
    pieces = {key: x for key, x in bpe.items() if key not in ("ggml.merges", "ggml.pre")}
    pieces |= {"ggml.model": "llama", "ggml.scores": [-float(i) for i in range(97)]}
    # The scaling of LLaMA 3, which is read before the model's tensors.
    kept = (8192 / (2 * np.pi * 500_000**0.5) - 1) / 3
    divisors = [1.0, 1.0, 1 / (kept + (1 - kept) / 8), 8.0]
    freqs = {"rope_freqs.weight": np.array(divisors, np.float32)}
    sliding, phi3 = newer_configs()
    factors = {
        f"rope_factors_{name}.weight": np.array(values, np.float32)
        for name, values in (("long", LONG_FACTORS), ("short", SHORT_FACTORS))
    }
    theta = {"rope__freq_base": 500_000.0}
    # LongRoPE's, from 8 tokens to 16.
    factor = {"rope__scaling__attn_factor": float(np.sqrt(1 + np.log(2) / np.log(8)))}
    written = {
        "gguf llama": (sf.LlamaForCausalLM(llama), Kind.F32, bpe, {}, {}),
        "gguf llama 3": (sf.LlamaForCausalLM(llama), Kind.Q8_0, pieces, freqs, theta),
        "gguf gpt2": (sf.GPT2LMHeadModel(gpt2), Kind.F16, bpe, {}, {}),
        "gguf phi3": (sf.Phi3ForCausalLM(phi3), Kind.Q8_0, pieces, factors, factor),
        "gguf gemma3": (sf.Gemma3ForCausalLM(sliding), Kind.F16, pieces, {}, {}),
    }
    seeds, file = {}, folder / NAME
    for name, (model, kind, tokenizer, extra, settings) in written.items():
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        tensors = torch_tensors(model, params)
        write_gguf(file, model.config, tensors, kind, tokenizer=tokenizer, extra=extra, **settings)
        seeds[name] = {NAME: file.read_bytes()}
        _places[len(seeds[name][NAME])] = _find_places(file)
    # As the library itself writes layers of unequal widths.
    narrow = sf.SparseFFNConfig(
        32,
        64,
        "silu",
        spectral=sf.SpectralConfig("low_rank", rank=4),
        micro=sf.MicroRefinementConfig(sf.CoreConfig(24)),
        gated=True,
        bias=False,
    )
    llama.num_hidden_layers, llama.vocab_size = 2, len(sf.load_tokenizer(sf.EMBEDDED_MODEL))
    model = sf.LlamaForCausalLM(llama, (narrow, None))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    sf.export_gguf(file, model, params, tokenizer=sf.EMBEDDED_MODEL, overwrite=True)
    seeds["gguf deci"] = {NAME: file.read_bytes()}
    _places[len(seeds["gguf deci"][NAME])] = _find_places(file)
    return seeds


def replace_a_number(choose: random.Random, files: Files) -> None:
    """Replaces a count, a length, a type, a side, an offset or a setting."""
    data = bytearray(files[NAME])
    # Of the file as it was: after another fault they may be elsewhere, which is one fault more.
    places = _places.get(len(data)) or choose.choice(sorted(_places.items()))[1]
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        at, size = choose.choice(places)
        if at + size <= len(data):
            value = choose.choice(choose.choice((_HUGE, _SMALL))) % 2 ** (8 * size)
            data[at : at + size] = struct.pack(_FORMATS[size], value)
    files[NAME] = bytes(data)


def announce_and_end(choose: random.Random, files: Files) -> None:
    """Announces many settings, tensors, strings, numbers or nested arrays where little follows."""
    kind, inner = choose.choice((8, 9)), choose.choice((0, 8, 9, 12))
    count = choose.choice((2**16, 2**24, 2**40, 2**61, 2**64 - 1))
    value = struct.pack("<IQ", inner, count) if kind == 9 else struct.pack("<Q", count)
    if kind == inner == 9:
        value *= choose.choice((1, 5000))
    start = struct.pack("<IQQ", 3, choose.choice((0, count)), choose.choice((1, count)))
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind)
    files[NAME] = b"GGUF" + start + key + value + bytes(choose.choice((0, 64, 9999)))


def exchange_strings(choose: random.Random, files: Files) -> None:
    """Gives keys, values, tokens or tensors another's name, of the same length or not."""
    text = (
        "llama gpt2 phi3 gemma3 token_embd attn_q attn_k ffn_up weight bias block_count tokens "
        "merges scores ab w1 blk.0 blk.9"
    )
    words = [word.encode() for word in text.split()]
    old, new = choose.choice(words), choose.choice(words)
    data = files[NAME]
    at = data.find(old, choose.randrange(len(data) // 2 + 1))
    if at >= 0:
        files[NAME] = data[:at] + new + data[at + len(new if choose.random() < 0.7 else old) :]


def put_in_values(choose: random.Random, files: Files) -> None:
    """Puts NaN, infinity or random bytes over weights or block scales."""
    data = files[NAME]
    size = choose.choice((2, 4, 64))
    if len(data) > 8000:
        value = choose.choice((b"\xff", b"\0\x7c", b"\0\0\x80\x7f", choose.randbytes(64)))
        at = choose.randrange(5000, len(data) - size)
        files[NAME] = data[:at] + (value * size)[:size] + data[at + size :]


FAULTS: tuple[Callable[[random.Random, Files], None], ...] = (
    replace_a_number,
    replace_a_number,
    replace_a_number,
    replace_a_number,
    announce_and_end,
    exchange_strings,
    exchange_strings,
    put_in_values,
)

# Where the numbers of a valid file lie, and how many bytes they have, by the file's size.
_places: dict[int, list[tuple[int, int]]] = {}


def _find_places(file: Path) -> list[tuple[int, int]]:
    reader = gguf.GGUFReader(file)
    places = [(4, 4), (8, 8), (16, 8)]
    fields = [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]
    for field in fields:
        if field.name.startswith("GGUF."):
            continue
        at = field.offset
        for part in field.parts[:24]:
            if part.itemsize in _FORMATS and part.dtype != np.uint8:
                places += [(at + i * part.itemsize, part.itemsize) for i in range(part.size)]
            at += part.nbytes
    return places
