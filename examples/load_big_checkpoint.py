"""Measures the host memory that loading a large checkpoint takes.

    python examples/load_big_checkpoint.py                        # 1.1 billion parameters
    python examples/load_big_checkpoint.py --parameters 100000000

Writes a LLaMA-shaped checkpoint of random bfloat16 weights, in shards, to a temporary folder; then
a fresh process loads it and reports the peak of its resident memory, before and during the load.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import LlamaConfig

from sparseffn_jax import LlamaForCausalLM, load_pretrained

SHARD_BYTES = 500_000_000


def main() -> None:
    """Writes the checkpoint, loads it in a process of its own, and prints what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=1_100_000_000)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        print(json.dumps(load_and_measure(arguments.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        shapes = write_checkpoint(Path(folder), arguments.parameters)
        print(f"wrote {shapes:,} parameters to {folder}")
        child = subprocess.run(
            [sys.executable, __file__, "--load", folder],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    measured = json.loads(child.stdout)
    weights, baseline, peak = (measured[name] for name in ("weights", "baseline", "peak"))
    print(f"weights            {weights / 1e9:8.3f} GB in {measured['dtype']}")
    print(f"before the load    {baseline / 1e9:8.3f} GB resident (Python, JAX, transformers)")
    print(f"peak of the load   {peak / 1e9:8.3f} GB resident, {peak / weights:.3f} x the weights")
    print(f"above the baseline {(peak - baseline) / weights:8.3f} x the weights")


def make_config(parameters: int) -> LlamaConfig:
    """Returns a config of about that many parameters, in the proportions of TinyLlama 1.1B."""
    scale = (parameters / 1.1e9) ** (1 / 3)
    layers = max(2, round(22 * scale))
    width = max(64, round(2048 * scale / 64) * 64)
    return LlamaConfig(
        vocab_size=round(32000 * scale),
        hidden_size=width,
        intermediate_size=round(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=1,
    )


def write_checkpoint(folder: Path, parameters: int) -> int:
    """Writes shards of random weights, one after the other; returns how many parameters."""
    config = make_config(parameters)
    (folder / "config.json").write_text(config.to_json_string())
    model = LlamaForCausalLM(config)
    leaves = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    shapes = {}
    for path, leaf in flatten_dict(leaves, sep=".").items():
        name, transposed = LlamaForCausalLM.names.to_name(path)
        shapes[name] = leaf.shape[::-1] if transposed else leaf.shape
    # The shard in which a tensor's first byte falls when all are laid end to end.
    starts = np.cumsum([0, *(2 * math.prod(shape) for shape in shapes.values())])
    weight_map = {
        name: f"model-{start // SHARD_BYTES:05d}.safetensors"
        for name, start in zip(shapes, starts, strict=False)
    }
    rng = np.random.default_rng(0)
    for file in sorted(set(weight_map.values())):
        shard = {
            name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in shapes.items()
            if weight_map[name] == file
        }
        save_file(shard, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(map(math.prod, shapes.values()))


def load_and_measure(folder: Path) -> dict[str, int | str]:
    """Loads the checkpoint as it is stored and returns bytes of weights and of resident memory."""
    # What Python, JAX and its first array take is there with any model.
    jax.block_until_ready(jax.numpy.zeros(8, jax.numpy.bfloat16).T)
    baseline = peak_resident_bytes()
    leaves = jax.tree.leaves(load_pretrained(folder, param_dtype=None).params)
    jax.block_until_ready(leaves)
    return {
        "weights": sum(leaf.nbytes for leaf in leaves),
        "dtype": str(leaves[0].dtype),
        "baseline": baseline,
        "peak": peak_resident_bytes(),
    }


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had resident, mapped files included."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None, "needs Linux"
    return 1024 * int(match[1])


if __name__ == "__main__":
    main()
