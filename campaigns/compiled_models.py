"""Whole models on an H100, as compiled: what FFNs promise the model, and what its programs say.

python campaigns/compiled_models.py --out campaigns/results/compiled_models.json

FFNs are sized by the promise of a speed-up that the estimates of single layers make, as a plan
would with layers that are all alike; then the model's own training step and decoding step are
compiled. Weights are not needed, so that any size fits this machine.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from transformers import GPT2Config, LlamaConfig

import sparseffn_jax as sf
from sparseffn_jax.bench.estimated import known_gpu
from sparseffn_jax.bench.estimated_model import (
    Pass,
    compile_pass,
    estimate_model,
    model_estimate_table,
    promised_speedup,
)
from sparseffn_jax.measure.gpus import GPU
from sparseffn_jax.measure.records import versions, write_json
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.progress import stage
from sparseffn_jax.sparsify.sizing import size_model

_SPEEDUP = 1.5
# FFN FLOPs over the dense FFN's, from the largest on.
_RATIOS = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def models() -> dict[str, Decoder]:
    """Returns the models, of which no weight exists."""
    gpt2 = GPT2Config()
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    return {
        "GPT-2 small": sf.GPT2LMHeadModel(gpt2, dtype=jnp.bfloat16, remat=True),
        "LLaMA 7B": sf.LlamaForCausalLM(llama, dtype=jnp.bfloat16, remat=True),
    }


def row_of(dense: Decoder, name: Pass, batch_size: int, window: int, gpu: GPU) -> dict[str, object]:
    """Returns the row of the widest FFN that promises the speed-up, or of the narrowest there is.

    Args:
      dense: a model whose layers are all dense.
      name: the pass.
      batch_size: number of sequences.
      window: tokens in a sequence.
      gpu: the GPU to compile for.
    """
    compiled = compile_pass(dense, name, batch_size, window, gpu)
    tokens = batch_size * (1 if name == "decoding" else window)
    ffns = [size_model(dense.spec, ratio) for ratio in _RATIOS]

    def promises(ffn: sf.SparseFFNConfig) -> bool:
        _, speedup = promised_speedup(dense, gpu.seconds(compiled), ffn, name, tokens, gpu)
        return speedup >= _SPEEDUP

    ffn = next(filter(promises, ffns), ffns[-1])
    row = estimate_model(dense, compiled, ffn, name, batch_size, window, gpu)
    return row | {"flops": sf.flops_ratio(ffn), "ffn": ffn.to_dict()}


def main() -> None:
    """Compiles, prints the tables and writes the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compiled_models.json"))
    parser.add_argument("--gpu", default="h100")
    arguments = parser.parse_args()
    gpu, console = known_gpu(arguments.gpu), Console()
    result = {"versions": versions(), "gpu": gpu.description, "models": {}}
    passes: list[tuple[Pass, int, int]] = [("training step", 8, 1024), ("decoding", 1, 1024)]
    for name, dense in models().items():
        rows = []
        for each in passes:
            with stage(f"compiling {name}, {each[0]}", console):
                rows.append(row_of(dense, *each, gpu))
        result["models"][name] = rows
        console.print(model_estimate_table(f"{name} on {gpu.description}, bfloat16", rows))
        write_json(arguments.out, result)
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
