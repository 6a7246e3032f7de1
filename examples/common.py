"""What the examples of the model families share: the command line, a stand-in, the job itself."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparseffn_jax as sf

END_OF_TEXT = "<|endoftext|>"
BYTES = pre_tokenizers.ByteLevel.alphabet()
# Sizes of a stand-in, in the names that every family's config knows or maps to its own.
TINY: dict[str, Any] = {
    "vocab_size": len(BYTES) + 1,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": len(BYTES),
    "eos_token_id": len(BYTES),
}
_CALIBRATION_WINDOWS = 128
_EVALUATION_WINDOWS = 64

# From what a dense model is to what its layers become: one config for all, or one or None for each.
Design = Callable[[sf.DecoderSpec], sf.SparseFFNConfig | Sequence[sf.SparseFFNConfig | None]]


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line that the examples have in common."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--model", help="hub name or folder; without it a tiny random model stands in"
    )
    parser.add_argument(
        "--text",
        default=str(Path(sf.__file__).parent),
        help="file, folder or dataset; without it the source of sparseffn_jax",
    )
    parser.add_argument("--out", type=Path, help="folder for the sparse model")
    parser.add_argument("--steps", type=int, default=100, help="of distillation and fine-tuning")
    parser.add_argument("--window", type=int, default=64, help="tokens in a window")
    parser.add_argument("--prompt", default="def main():\n")
    return parser.parse_args(arguments)


def run(
    options: argparse.Namespace,
    stand_in: sf.Decoder,
    design: Design,
    *,
    recipe: str = "ffn_only",
    new_tokens: int = 40,
    save: Callable[..., None] = sf.save_pretrained,
) -> tuple[sf.Decoder, Any]:
    """Loads, sparsifies, fine-tunes against the dense model and lets the sparse one write.

    Args:
      options: as :func:`parse` returns them.
      stand_in: what is drawn at random without ``options.model``; its tokens are bytes.
      design: what the layers become.
      recipe: what trains; see :class:`sparseffn_jax.TrainConfig`.
      new_tokens: how many are generated.
      save: how the sparse model is written to ``options.out``.

    Returns:
      The sparse model and its parameters.
    """
    console = Console()
    if options.model is None:
        console.print("No --model: a tiny random one stands in, and writes nonsense")
        dense, tokenizer = stand_in, byte_tokenizer()
        params: Any = jax.jit(dense.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    else:
        loaded, tokenizer = sf.load_pretrained(options.model), sf.load_tokenizer(options.model)
        dense, params = loaded.model(), loaded.params
    windows = sf.load_windows(options.text, tokenizer, options.window, validation_fraction=0.1)
    held_out = windows.validation[:_EVALUATION_WINDOWS]

    def report(what: str, model: sf.Decoder, params: Any) -> None:
        console.print(f"{what:12} {sf.evaluate_loss(model, params, held_out, 8):.4f} nats a token")

    report("dense", dense, params)
    calibration = windows.train[:_CALIBRATION_WINDOWS, :-1]
    sparse, start = sf.sparsify(
        dense, params, design(dense.spec), calibration, distill_steps=options.steps
    )
    report("sparsified", sparse, start)
    config = sf.TrainConfig(steps=options.steps, recipe=recipe, distill_weight=0.5, eval_every=0)
    with tempfile.TemporaryDirectory() as folder:
        tuned = sf.train(sparse, start, windows, config, folder, teacher=(dense, params)).params
    report("fine-tuned", sparse, tuned)
    (text,) = sf.generate_text(sparse, tuned, tokenizer, [options.prompt], new_tokens)
    console.print(options.prompt + text, markup=False, highlight=False)
    if options.out is not None:
        save(options.out, sparse, tuned, tokenizer=tokenizer)
    return sparse, tuned


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of single bytes: nothing to train, and nothing to download."""
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(BYTES))}, []))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
