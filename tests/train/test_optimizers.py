"""Two updates of each optimizer against the papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_models import SPARSE_FFN, make_model

from sparseffn_jax.models.paths import is_attention_kernel, is_hidden_matrix
from sparseffn_jax.nn.lora import init_lora
from sparseffn_jax.train import recipes
from sparseffn_jax.train.choices import DEFAULTS

RATES, DECAY, BETA = {"ffn": 1e-3, "rest": 4e-3}, 0.3, 0.95


@pytest.fixture(scope="module")
def params():
    """A sparse layer and a dense one, with a head of its own and adapters."""
    _, params = make_model(ffns=(SPARSE_FFN, None), tie_word_embeddings=False)
    params = {**params, "lora": init_lora(jax.random.key(0), params, 2, is_attention_kernel)}
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params)


def adamw(grads, step):
    m = sum(0.1 * 0.9 ** (step - i) * g for i, g in enumerate(grads, 1)) / (1 - 0.9**step)
    v = sum(0.05 * 0.95 ** (step - i) * g**2 for i, g in enumerate(grads, 1)) / (1 - 0.95**step)
    return m / (np.sqrt(v) + 1e-8)


def lion(grads, step):
    m = sum(0.02 * 0.98 ** (step - 1 - i) * g for i, g in enumerate(grads[:-1], 1))
    return np.sign(0.95 * m + 0.05 * grads[-1])


def muon(grads, step):
    m = sum((1 - BETA) * BETA ** (step - i) * g for i, g in enumerate(grads, 1))
    # Nesterov's momentum, with both parts corrected for their start at zero.
    x = BETA * m / (1 - BETA ** (step + 1)) + (1 - BETA) * grads[-1] / (1 - BETA**step)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


def is_muons(path, leaf):
    names = {"kernel", "axes", "filter"}
    return path[0] == "transformer" and leaf.ndim == 2 and path[-1] in names and "h" in path


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_two_updates(name, params):
    optimizer, labels = recipes.full(
        params, RATES["rest"], RATES["ffn"], weight_decay=DECAY, clip_norm=1e9, optimizer=name
    )
    labels, rng = flatten_dict(labels), np.random.default_rng(1)
    state, now, seen = optimizer.init(params), params, []
    update = jax.jit(optimizer.update)
    for step in (1, 2):
        grads = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params)
        seen.append(flatten_dict(grads))
        changes, state = update(grads, state, now)
        for path, change in flatten_dict(changes).items():
            leaf = np.asarray(flatten_dict(now)[path], np.float64)
            rule = {"adamw": adamw, "lion": lion, "muon": adamw}[name]
            if name == "muon" and is_muons(path, leaf):
                rule = muon
            expected = rule([grads[path].astype(np.float64) for grads in seen], step)
            if leaf.ndim >= 2 and path[-1] not in ("embedding", "polynomial"):
                expected = expected + DECAY * leaf
            expected = -RATES[labels[path]] * expected
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                change, expected, rtol=1e-3, atol=2e-4 * scale, err_msg="/".join(path)
            )
        now = jax.tree.map(jnp.add, now, changes)


def test_muon_has_one_slot_for_a_hidden_matrix(params):
    optimizer, labels = recipes.ffn_only(params, 1e-3, 1e-4, optimizer="muon")
    trainable, _ = recipes.partition(params, labels)
    flat = flatten_dict(trainable)
    slots = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(trainable)))
    one = sum(leaf.size for path, leaf in flat.items() if is_muons(path, leaf))
    two = sum(leaf.size for path, leaf in flat.items() if not is_muons(path, leaf))
    assert one + 2 * two <= slots < one + 2 * two + 20


@pytest.mark.parametrize(
    ("path", "ndim", "is_one"),
    [
        (("transformer", "h", "0", "attn", "c_attn", "kernel"), 2, True),
        (("model", "layers", "11", "mlp", "spectral", "bypass", "axes"), 2, True),
        (("model", "layers", "11", "mlp", "core", "up", "kernel"), 3, False),
        (("model", "layers", "11", "mlp", "spectral", "polynomial"), 2, False),
        (("model", "layers", "11", "mlp", "core", "up", "bias"), 1, False),
        (("lora", "transformer", "h", "0", "attn", "c_attn", "kernel", "a"), 2, False),
        (("model", "embed_tokens", "embedding"), 2, False),
        (("lm_head", "kernel"), 2, False),
    ],
)
def test_hidden_matrices(path, ndim, is_one):
    assert is_hidden_matrix(path, ndim) is is_one


def test_lions_decay_makes_up_for_its_rate():
    products = {name: rate * decay for name, (rate, decay) in DEFAULTS.items()}
    assert products["lion"] == pytest.approx(products["adamw"])
