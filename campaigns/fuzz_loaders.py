"""Throws damaged and malicious model folders, GGUF files, adapters and texts at the loaders.

    python campaigns/fuzz_loaders.py --inputs 20000
    python campaigns/fuzz_loaders.py --inputs 5000 --only gguf
    python campaigns/fuzz_loaders.py --inputs 20000 --only text

Each input is a valid folder or file with one to three faults: random bytes, structured lies in
safetensors headers, msgpack, index, config, tokenizer and GGUF files, in rows of JSON lines and of
parquet files, and in their messages. A loader may load it or raise its own error; of texts, one
that names the file. Anything else fails the campaign: another exception, a hang, a crash (which
ends this process), or more memory than twice the folder's size and an allowance for what loading a
tiny model takes anyway.
"""

import argparse
import collections
import json
import random
import re
import resource
import shutil
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import campaign
import gguf_faults
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import text_faults
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import sparseffn_jax as sf
from sparseffn_jax.checkpoints.tokenizers import check_tokenizer
from sparseffn_jax.models.paths import is_attention_kernel
from sparseffn_jax.nn.lora import init_lora

SECONDS, ALLOWANCE, ADDRESS_SPACE = 20, 48 * 2**20, 8 * 2**30
Files = dict[str, bytes]
HUGE = (2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 10**30, -1, 0)


class Hang(BaseException):
    """A loader took too long."""


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="what the names of the valid inputs begin with")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz_loaders.json"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, _hang)
    logging.set_verbosity_error()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    largest = 0
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder) / "seed") | gguf_faults.make_seeds(Path(folder) / "gguf")
        seeds |= text_faults.make_seeds()
        seeds = {name: files for name, files in seeds.items() if name.startswith(arguments.only)}
        sound, target = Path(folder) / "seed", Path(folder) / "input"
        # What the first loads take for good, such as compiled code, is not an input's doing.
        for name, files in seeds.items():
            outcome, _ = attempt(write(target, files), sound)
            assert outcome == "loaded", f"{name}, without a fault: {outcome}"
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ADDRESS_SPACE, hard))
        for number in track(range(arguments.inputs), description="fuzzing"):
            choose = random.Random(f"{arguments.seed}/{number}")
            name = choose.choice(sorted(seeds))
            files = dict(seeds[name])
            done = []
            for _ in range(choose.choice((1, 1, 1, 2, 3))):
                fault = choose.choice(_faults(name))
                done.append(fault.__name__)
                fault(choose, files)
            write(target, files)
            outcome, used = attempt(target, sound)
            over = used - 2 * sum(map(len, files.values()))
            largest = max(largest, over)
            if over > ALLOWANCE:
                outcome = f"took {used:,} bytes"
            counts[outcome.splitlines()[0]] += 1
            if outcome not in ("loaded", "refused"):
                failures.append(f"input {number} ({name}: {', '.join(done)}): {outcome}")
    rows = {"inputs": arguments.inputs, **counts, "failed": len(failures)}
    rows["most memory beyond twice the files"] = f"{largest / 2**20:.1f} MiB"
    settings = {**vars(arguments), "allowance": ALLOWANCE}
    campaign.finish("Fuzzed loaders", rows, failures, arguments.out, settings)


def attempt(folder: Path, sound: Path) -> tuple[str, int]:
    """Loads an input; returns what came of it, and the most memory it took.

    A folder without a model is loaded as an adapter of the model in ``sound``.
    """
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = _status("VmRSS")
    signal.alarm(SECONDS)
    try:
        _load(folder, sound)
        outcome = "loaded"
    except (sf.CheckpointError, text_faults.Refused):
        outcome = "refused"
    except Hang:
        outcome = "hung\n" + traceback.format_exc()[-1500:]
    except BaseException as error:
        outcome = f"{type(error).__name__}\n{traceback.format_exc()[-1500:]}"
    finally:
        signal.alarm(0)
    return outcome, _status("VmHWM") - before


def _load(folder: Path, sound: Path) -> None:
    if any(file.suffix in text_faults.SUFFIXES for file in folder.iterdir()):
        text_faults.load(folder)
        return
    source = folder / gguf_faults.NAME if (folder / gguf_faults.NAME).exists() else folder
    adapter = None
    if any(folder.glob("adapter*")) and not (folder / "tokenizer.json").exists():
        source, adapter = sound, folder
    pretrained = sf.load_pretrained(source, adapter=adapter)
    check_tokenizer(sf.load_tokenizer(source), pretrained.config)


def make_seeds(folder: Path) -> dict[str, Files]:
    """Returns valid folders in all forms."""
    model, params = campaign.tiny_model()
    words = {f"w{i}": i for i in range(90)} | {"<|endoftext|>": 90}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    sf.save_pretrained(folder, model, params, tokenizer=fast)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    common = {name: data for name, data in whole.items() if name != "model.safetensors"}
    tensors = safetensors.numpy.load(whole["model.safetensors"])
    names, flat = sorted(tensors), campaign.flat(params)
    paths = sorted(flat)
    halves = [names[::2], names[1::2]]
    shards = {
        f"model-{i}.safetensors": safetensors.numpy.save({n: tensors[n] for n in half})
        for i, half in enumerate(halves)
    }
    index = {n: f"model-{i}.safetensors" for i, half in enumerate(halves) for n in half}
    flax_shards = {
        f"flax-{i}.msgpack": msgpack_serialize({path: flat[path] for path in paths[i::2]})
        for i in (0, 1)
    }
    adapter = sf.LoraAdapter(
        init_lora(jax.random.key(0), params, 2, is_attention_kernel),
        {path: 0.5 for path in flatten_dict(params) if is_attention_kernel(path)},
        {"transformer": {"h": {"0": {"mlp": params["transformer"]["h"]["0"]["mlp"]}}}},
    )
    sf.save_adapter(folder / "adapter", model, adapter)
    flax_index = {path: f"flax-{i}.msgpack" for i in (0, 1) for path in paths[i::2]}
    sliding, fused = gguf_faults.newer_configs()
    return {
        "adapter": {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()},
        "safetensors": whole,
        "sliding": _folder(folder / "sliding", sf.Gemma3ForCausalLM(sliding), fast),
        "fused": _folder(folder / "fused", sf.Phi3ForCausalLM(fused), fast),
        "shards": common | shards | {"model.safetensors.index.json": _index(index)},
        "msgpack": common | {"flax_model.msgpack": msgpack_serialize(_arrays(params))},
        "msgpack shards": common
        | flax_shards
        | {"flax_model.msgpack.index.json": _index(flax_index)},
    }


def _folder(folder: Path, model: sf.Decoder, tokenizer: PreTrainedTokenizerFast) -> Files:
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    sf.save_pretrained(folder, model, params, tokenizer=tokenizer)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(folder: Path, files: Files) -> Path:
    """Writes a folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# --- faults ------------------------------------------------------------------------------------


def flip_bits(choose: random.Random, files: Files) -> None:
    """Flips bits anywhere."""
    name = _any(choose, files)
    data = bytearray(files[name])
    for _ in range(choose.choice((1, 1, 4, 64))):
        if data:
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    files[name] = bytes(data)


def flip_early_bits(choose: random.Random, files: Files) -> None:
    """Changes bytes where formats have their headers."""
    name = _any(choose, files)
    data = bytearray(files[name])
    for _ in range(choose.choice((1, 2, 8))):
        if data:
            data[choose.randrange(min(len(data), 256))] = choose.randrange(256)
    files[name] = bytes(data)


def truncate(choose: random.Random, files: Files) -> None:
    """Cuts a file short."""
    name = _any(choose, files)
    files[name] = files[name][: choose.randrange(len(files[name]) + 1)]


def insert(choose: random.Random, files: Files) -> None:
    """Puts bytes into a file, or after its end."""
    name = _any(choose, files)
    at = choose.choice((0, len(files[name]), choose.randrange(len(files[name]) + 1)))
    files[name] = files[name][:at] + choose.randbytes(choose.choice((1, 8, 999))) + files[name][at:]


def remove_file(choose: random.Random, files: Files) -> None:
    """Takes a file away."""
    del files[_any(choose, files)]


def swap_files(choose: random.Random, files: Files) -> None:
    """Exchanges two files."""
    a, b = _any(choose, files), _any(choose, files)
    files[a], files[b] = files[b], files[a]


def lie_in_a_header(choose: random.Random, files: Files) -> None:
    """Changes a tensor's type, shape, place or name in a safetensors header."""
    name = _any(choose, files, ".safetensors")
    parsed = _split_header(files.get(name, b""))
    if parsed is None:
        return
    header, data = parsed
    entries = [key for key in header if key != "__metadata__"]
    if not entries:
        return
    key = choose.choice(entries)
    entry = header[key]
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return
    kind = choose.randrange(8)
    if kind == 0:
        entry["dtype"] = choose.choice(("F64", "I8", "BF16", "F8_E4M3", "F4", "OBJECT", 7, None))
    elif kind == 1:
        entry["shape"] = choose.choice(([], [2**62], [2**40, 2**40], [0], [-1], "x", [1.5], [[1]]))
    elif kind == 2:
        entry["data_offsets"] = [choose.choice(HUGE), choose.choice(HUGE)]
    elif kind == 3:
        other = header[choose.choice(entries)]
        if isinstance(other, dict):
            entry["data_offsets"] = other.get("data_offsets")
    elif kind == 4:
        header[choose.choice(("../x", "/etc/passwd", "", "\0", "a" * 5000))] = header.pop(key)
    elif kind == 5:
        del header[key]
    elif kind == 6:
        entry[choose.choice(tuple(entry))] = choose.choice((None, {}, [], "1", 2**70, True))
    text = json.dumps(header)
    if kind == 7:
        text = text[:-1] + f', "{key}": {json.dumps(entry)}' + "}"
    files[name] = struct.pack("<Q", len(text)) + text.encode() + data


def lie_about_the_header(choose: random.Random, files: Files) -> None:
    """Announces a header of another length, or one of deep nesting."""
    name = _any(choose, files, ".safetensors")
    data = files.get(name, b"")
    if len(data) < 8:
        return
    kind = choose.randrange(3)
    if kind == 0:
        files[name] = struct.pack("<Q", choose.choice(HUGE) % 2**64) + data[8:]
    else:
        text = b"[" * 100_000 if kind == 1 else b'{"a":' * 50_000
        files[name] = struct.pack("<Q", len(text)) + text + data


def bomb_msgpack(choose: random.Random, files: Files) -> None:
    """Puts a header that announces far more than there is, or deep nesting, into msgpack."""
    name = _any(choose, files, ".msgpack")
    if name not in files:
        return
    size = choose.choice((2**16, 2**24, 2**31, 2**32 - 1))
    code = choose.choice((0xDC, 0xDD, 0xDE, 0xDF, 0xC4, 0xC6, 0xC7, 0xC9, 0xD9, 0xDB))
    head = bytes([code]) + struct.pack(">I", size) + choose.choice((b"", b"\x01"))
    bomb = choose.choice((head, head * 200, b"\x81\xa1a" * 30_000, b"\x91" * 30_000))
    data = files[name]
    at = choose.choice((0, choose.randrange(len(data) + 1), min(len(data), 40)))
    files[name] = data[:at] + bomb + data[at + choose.choice((0, len(bomb))) :]


def bad_index(choose: random.Random, files: Files) -> None:
    """Places tensors elsewhere."""
    name = _any(choose, files, ".index.json")
    values = _object(files.get(name, b""))
    places = values.get("weight_map") if values else None
    if not values or not isinstance(places, dict) or not places:
        return
    outside = (
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\0b",
        "\\\\host\\x",
        3,
        None,
        [],
        "config.json",
    )
    for key in choose.sample(sorted(places), min(len(places), choose.choice((1, 99)))):
        places[key] = choose.choice(outside)
    if choose.random() < 0.3:
        values["weight_map"] = choose.choice(([], {}, 3, None, {"a": {}}))
    files[name] = json.dumps(values).encode()


def bad_config(choose: random.Random, files: Files) -> None:
    """Changes values of the config, anywhere in it."""
    _mutate_json(choose, files, "config.json")


def bad_adapter(choose: random.Random, files: Files) -> None:
    """Changes values of an adapter's settings, anywhere in them."""
    _mutate_json(choose, files, "adapter_config.json")


def bad_tokenizer(choose: random.Random, files: Files) -> None:
    """Changes values of the tokenizer's files, anywhere in them."""
    _mutate_json(choose, files, choose.choice(("tokenizer.json", "tokenizer_config.json")))


def huge_json(choose: random.Random, files: Files) -> None:
    """Replaces a JSON file by one that is deep or wide."""
    name = _any(choose, files, ".json")
    files[name] = choose.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"[1" + b",1" * 200_000 + b"]",
            b"1" * 10_000,
            b"NaN",
            b"",
        )
    )


def not_finite(choose: random.Random, files: Files) -> None:
    """Puts NaN or infinity over weights."""
    name = choose.choice(
        [n for n in sorted(files) if n.endswith(("safetensors", "msgpack"))] or [""]
    )
    data = files.get(name, b"")
    if len(data) > 4000:
        value = np.array([choose.choice((np.nan, np.inf, -np.inf))] * 4, np.float32).tobytes()
        at = choose.randrange(3000, len(data) - len(value))
        files[name] = data[:at] + value + data[at + len(value) :]


FAULTS: tuple[Callable[[random.Random, Files], None], ...] = (
    flip_bits,
    flip_early_bits,
    truncate,
    insert,
    remove_file,
    swap_files,
    lie_in_a_header,
    lie_in_a_header,
    lie_about_the_header,
    bomb_msgpack,
    bomb_msgpack,
    bad_index,
    bad_config,
    bad_config,
    bad_adapter,
    bad_tokenizer,
    huge_json,
    not_finite,
)

ANYWHERE = (flip_bits, flip_early_bits, truncate, insert)


def _faults(name: str) -> tuple[Callable[[random.Random, Files], None], ...]:
    """Returns the faults of the valid input of a name."""
    if name.startswith("gguf"):
        return (*ANYWHERE * 2, *gguf_faults.FAULTS)
    if name.startswith("text"):
        return (*ANYWHERE, remove_file, swap_files, *text_faults.FAULTS)
    return FAULTS


def _mutate_json(choose: random.Random, files: Files, name: str) -> None:
    values = _object(files.get(name, b""))
    if not values:
        return
    holder = values
    while True:
        keys = list(range(len(holder))) if isinstance(holder, list) else sorted(holder, key=str)
        key = choose.choice(keys)
        inner = holder[key]
        if not (isinstance(inner, dict | list) and inner) or choose.random() < 0.2:
            break
        holder = inner
    strange = (*HUGE, None, True, "", "x", "../x", [], {}, [[]], 1e308, float("nan"), 0.5, 3, 64)
    holder[key] = choose.choice(strange)
    if isinstance(holder, dict) and choose.random() < 0.2:
        del holder[key]
    files[name] = json.dumps(values).encode()


def _any(choose: random.Random, files: Files, suffix: str = "") -> str:
    fitting = [name for name in sorted(files) if name.endswith(suffix)]
    return choose.choice(fitting or sorted(files) or ["config.json"]) if files else _none(files)


def _none(files: Files) -> str:
    files["config.json"] = b""
    return "config.json"


def _object(data: bytes) -> dict | None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _split_header(data: bytes) -> tuple[dict, bytes] | None:
    if len(data) < 8:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    header = _object(data[8 : 8 + length])
    return None if header is None else (header, data[8 + length :])


def _index(weight_map: dict[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def _arrays(tree):
    return {k: _arrays(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items()}


def _hang(*_):
    raise Hang


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(match[1]) if match else 0


def _address_space() -> int:
    return _status("VmSize")


if __name__ == "__main__":
    main()
