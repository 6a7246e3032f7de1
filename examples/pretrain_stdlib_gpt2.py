"""Pretrains the small GPT-2 that comes with sparseffn_jax, on Python's standard library.

    python examples/pretrain_stdlib_gpt2.py --out stdlib-gpt2

About an hour and a half on two CPU cores, minutes on a GPU. Everything is made here: the text
is the source of the running Python's standard library, the tokenizer is trained on it, and the
result is a folder in Hugging Face format with a model card.
"""

import argparse
import dataclasses
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

from sparseffn_jax import GPT2LMHeadModel, evaluate_loss, save_pretrained
from sparseffn_jax.evaluate.fused_loss import mean_loss
from sparseffn_jax.evaluate.losses import forward
from sparseffn_jax.train import data
from sparseffn_jax.train.documents import Source

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the embedded model was made."""

    vocab_size: int = 1024
    window: int = 256
    width: int = 256
    layers: int = 3
    heads: int = 4
    batch_size: int = 24
    steps: int = 1280
    warmup_steps: int = 50
    decay_steps: int = 380
    matrix_rate: float = 5e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0


def main() -> None:
    """Makes text, tokenizer and model, and writes them with a model card."""
    parser = argparse.ArgumentParser(
        description="Pretrains the small GPT-2 that comes with sparseffn_jax."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already: give a new folder")
    settings = Settings(steps=arguments.steps)

    documents = list(Source("stdlib"))
    names = [document.name for document in documents]
    train_text, _ = data.split_names(names, [1] * len(names), 0.05)
    tokenizer = train_tokenizer([documents[i] for i in train_text], settings.vocab_size)
    windows = data.load_windows("stdlib", tokenizer, settings.window, 0.05)
    train, validation = windows.train, windows.validation

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=settings.vocab_size,
            n_positions=settings.window,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.heads,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    started = time.perf_counter()
    params = fit(model, train, settings)
    loss = evaluate_loss(model, params, validation, settings.batch_size)
    print(f"validation loss {loss:.4f} nats a token, {time.perf_counter() - started:.0f} s")

    save_pretrained(arguments.out, model, params, tokenizer=tokenizer, dtype=jnp.float16)
    card = model_card(settings, model, params, train, validation, loss)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")


def train_tokenizer(documents: list[Any], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: any text can be encoded, none is lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )


def fit(model: GPT2LMHeadModel, windows: np.ndarray, settings: Settings):
    """Trains from scratch: Muon for the matrices, AdamW for the rest."""
    # Warm-up, a plateau, and a linear decay to zero over the last part.
    schedule = optax.schedules.join_schedules(
        [
            optax.linear_schedule(1 / settings.warmup_steps, 1.0, settings.warmup_steps - 1),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, settings.decay_steps),
        ],
        [settings.warmup_steps, settings.steps - settings.decay_steps],
    )

    def is_matrix(path, leaf):
        is_kernel = path[-1].key == "kernel" and leaf.ndim == 2
        return optax.contrib.MuonDimensionNumbers() if is_kernel else None

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            lambda step: settings.matrix_rate * schedule(step),
            weight_decay=settings.weight_decay,
            adam_learning_rate=lambda step: settings.other_rate * schedule(step),
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
                is_matrix, params
            ),
        ),
    )

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            outputs, _ = forward(model, params, batch[:, :-1])
            return mean_loss(outputs, batch[:, 1:])[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    batches = data.make_batches(windows, settings.batch_size, settings.seed)
    key = jax.random.key(settings.seed)
    params: Any = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
    state = optimizer.init(params)
    for _ in track(range(settings.steps), description="pretraining"):
        params, state = step(params, state, next(batches))
    return params


def model_card(settings, model, params, train, validation, loss) -> str:
    """Returns the README.md of the model's folder."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    seen = settings.steps * settings.batch_size * settings.window
    config = model.config
    return f"""---
language: code
license: apache-2.0
library_name: sparseffn_jax
pipeline_tag: text-generation
---

# stdlib-gpt2

A small GPT-2 that writes Python, for demonstrations and tests of sparseffn_jax. It knows nothing
but the look of Python's standard library; do not use what it writes.

| | |
|---|---|
| parameters | {count:,} (float16) |
| shape | {config.n_layer} layers, d_model {config.n_embd}, d_ff {4 * config.n_embd}, \
{config.n_head} heads, {config.n_positions} positions |
| tokenizer | byte-level BPE, {config.vocab_size} tokens, trained on the training split |
| data | the source of the standard library of Python {platform.python_version()}, without tests; \
{train[:, 1:].size:,} training tokens; 5 % of the files held out |
| training | {settings.steps} steps of {settings.batch_size} windows of {settings.window} tokens \
({seen:,} tokens), Muon and AdamW |
| validation loss | {loss:.4f} nats a token over {validation[:, 1:].size:,} held-out tokens |
| made by | `python examples/pretrain_stdlib_gpt2.py` on {jax.devices()[0].device_kind} |

The training text is under the Python Software Foundation License.
"""


if __name__ == "__main__":
    main()
