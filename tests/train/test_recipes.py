import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from train_models import SPARSE_FFN, make_model

from sparseffn_jax.models.paths import is_attention_kernel
from sparseffn_jax.nn.lora import init_lora
from sparseffn_jax.train import recipes
from sparseffn_jax.train.recipes import combine, partition


@pytest.fixture(scope="module")
def params():
    """A sparse layer 0 and a dense layer 1, with adapters."""
    _, params = make_model(ffns=(SPARSE_FFN, None))
    return {**params, "lora": init_lora(jax.random.key(0), params, 2, is_attention_kernel)}


def label_of(labels):
    flat = {"/".join(path): label for path, label in flatten_dict(labels).items()}
    return lambda name: {flat[path] for path in flat if name in path} or None


def test_full_trains_everything(params):
    _, labels = recipes.full(params, 1e-3, 1e-4)
    label = label_of(labels)
    assert label("h/0/mlp") == {"ffn"}
    assert label("h/1/mlp") == label("attn") == label("wte") == label("ln_") == {"rest"}
    chex.assert_trees_all_equal_structs(labels, params)


def test_ffn_only_trains_the_feed_forward_layers(params):
    label = label_of(recipes.ffn_only(params, 1e-3, 1e-4)[1])
    assert label("h/0/mlp") == {"ffn"}
    assert label("h/1/mlp") == {"rest"}
    assert label("attn") == label("wte") == label("wpe") == label("ln_") == {"frozen"}


def test_lora_trains_the_adapters_too(params):
    label = label_of(recipes.lora(params, 1e-3, 1e-4)[1])
    assert label("h/0/mlp") == {"ffn"}
    assert label("lora/") == {"rest"}
    assert label("wte") == label("ln_") == {"frozen"}
    base = {path: leaf for path, leaf in params.items() if path != "lora"}
    with pytest.raises(ValueError, match="adapters"):
        recipes.lora(base, 1e-3, 1e-4)


def test_a_dense_layer_with_adapters_is_frozen_beside_them(params):
    kernels = {("transformer", "h", "1", "mlp", "c_fc", "kernel")}
    lora = init_lora(jax.random.key(0), params, 2, kernels.__contains__)
    label = label_of(recipes.lora({**params, "lora": lora}, 1e-3, 1e-4)[1])
    assert label("h/0/mlp") == {"ffn"}
    assert label("lora/transformer/h/1/mlp") == {"rest"}
    assert label("c_proj") == {"frozen"}
    alone = label_of(recipes.lora({**params, "lora": lora}, 1e-3, 1e-4, train_ffns=False)[1])
    assert alone("lora/") == {"rest"}
    assert alone("h/0/mlp") == alone("attn") == {"frozen"}


def test_stepwise_unfreezes_attention_and_norms(params):
    _, first = recipes.stepwise(params, 1e-3, 1e-4, stage=1)
    chex.assert_trees_all_equal(first, recipes.ffn_only(params, 1e-3, 1e-4)[1])
    label = label_of(recipes.stepwise(params, 1e-3, 1e-4, stage=2)[1])
    assert label("h/0/mlp") == {"ffn"}
    assert label("h/0/attn") == label("ln_") == label("ln_f") == {"rest"}
    assert label("wte") == label("wpe") == {"frozen"}


def test_partition_and_combine_are_inverse(params):
    _, labels = recipes.ffn_only(params, 1e-3, 1e-4)
    trainable, frozen = partition(params, labels)
    assert flatten_dict(trainable).keys().isdisjoint(flatten_dict(frozen))
    assert all("mlp" in path for path in flatten_dict(trainable))
    chex.assert_trees_all_equal(combine(trainable, frozen), params)


def test_the_optimizer_has_slots_for_what_trains_alone(params):
    optimizer, labels = recipes.ffn_only(params, 1e-3, 1e-4)
    trainable, _ = partition(params, labels)
    slots = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(trainable)))
    weights = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert 2 * weights <= slots < 2 * weights + 5


def update(optimizer, trainable, grads):
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(trainable), trainable)
    return {"/".join(path): leaf for path, leaf in flatten_dict(updates).items()}


def test_each_label_has_its_rate(params):
    optimizer, labels = recipes.full(params, 1e-3, 1e-4, weight_decay=0.0)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2), params)
    updates = update(optimizer, params, grads)
    # Adam's first update is the rate, whatever the gradient.
    for path, label in flatten_dict(labels).items():
        rate = {"ffn": 1e-4, "rest": 1e-3}[label]
        np.testing.assert_allclose(updates["/".join(path)], -rate, rtol=1e-3)


def test_weight_decay_is_for_matrices_alone(params):
    optimizer, _ = recipes.full(params, 1e-3, 1e-3, weight_decay=0.1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates = update(optimizer, ones, jax.tree.map(jnp.zeros_like, params))
    decayed = {path for path, leaf in updates.items() if np.abs(leaf).max() > 0}
    assert decayed == {
        path
        for path in updates
        if path.endswith(("kernel", "axes", "filter", "kernel/a", "kernel/b"))
    }
    assert "transformer/h/0/mlp/spectral/polynomial" in updates


def test_gradients_are_clipped_by_their_global_norm():
    params = {"mlp": {"kernel": jnp.zeros((2, 2))}}
    grads = {"mlp": {"kernel": jnp.full((2, 2), 50.0)}}
    optimizer, _ = recipes.full(params, 1e-3, 1e-3, clip_norm=2.0)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)]
    np.testing.assert_allclose(np.linalg.norm(moments[0]), 0.1 * 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    "recipe", [recipes.ffn_only, *recipes.RECIPES["stepwise"]], ids=["ffn_only", "1", "2"]
)
def test_a_recipe_that_trains_nothing_is_refused(recipe):
    params = {"dense": {"kernel": jnp.zeros((2, 2))}, "head": {"bias": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r"none of .* the name mlp, and .* has dense, head\. Name"):
        recipe(params, 1e-3, 1e-3)
