import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sparseffn_jax.models.paths import is_attention_kernel
from sparseffn_jax.nn.lora import LoraAdapter, init_lora, merge_lora

RNG = np.random.default_rng(0)
NAMES = ("c_attn", "c_proj")


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {
    "h": {
        "0": {
            "attn": {
                "c_attn": {"kernel": normal(12, 4), "bias": normal(12)},
                "c_proj": {"kernel": normal(4, 4), "bias": normal(4)},
            },
            "mlp": {"c_fc": {"kernel": normal(16, 4)}},
        }
    }
}


@pytest.fixture
def adapters():
    return init_lora(jax.random.key(0), PARAMS, 2, is_attention_kernel)


def test_adapters_are_on_attention_kernels_alone(adapters):
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(adapters).items()}
    assert shapes == {
        "h/0/attn/c_attn/kernel/a": (12, 2),
        "h/0/attn/c_attn/kernel/b": (2, 4),
        "h/0/attn/c_proj/kernel/a": (4, 2),
        "h/0/attn/c_proj/kernel/b": (2, 4),
    }


def test_the_start_is_exact(adapters):
    scales = dict.fromkeys((("h", "0", "attn", name, "kernel") for name in NAMES), 7.0)
    chex.assert_trees_all_equal(merge_lora(PARAMS, adapters, scales), PARAMS)


def test_the_factor_of_the_inputs_is_random(adapters):
    for a in (leaf for path, leaf in flatten_dict(adapters).items() if path[-1] == "a"):
        assert np.abs(a).min() > 0
    turned = init_lora(jax.random.key(0), PARAMS, 2, is_attention_kernel, lambda path: True)
    for path, leaf in flatten_dict(turned).items():
        assert (np.abs(leaf).min() > 0) == (path[-1] == "b")


def test_merging_adds_the_scaled_product(adapters):
    adapters = jax.tree.map(lambda x: normal(*x.shape), adapters)
    scales = {("h", "0", "attn", name, "kernel"): 2.0 + i for i, name in enumerate(NAMES)}
    merged = merge_lora(PARAMS, adapters, scales)
    chex.assert_trees_all_equal(LoraAdapter(adapters, scales).merge(PARAMS), merged)
    for i, name in enumerate(NAMES):
        kernel = PARAMS["h"]["0"]["attn"][name]["kernel"]
        factors = adapters["h"]["0"]["attn"][name]["kernel"]
        np.testing.assert_allclose(
            merged["h"]["0"]["attn"][name]["kernel"],
            kernel + (2.0 + i) * factors["a"] @ factors["b"],
            rtol=1e-5,
        )
    chex.assert_trees_all_equal(merged["h"]["0"]["mlp"], PARAMS["h"]["0"]["mlp"])


def test_ranks_by_path():
    ranks = {("h", "0", "attn", "c_attn", "kernel"): 3, ("h", "0", "mlp", "c_fc", "kernel"): 1}
    adapters = init_lora(jax.random.key(0), PARAMS, ranks.__getitem__, ranks.__contains__)
    shapes = {path[-3:]: leaf.shape for path, leaf in flatten_dict(adapters).items()}
    assert shapes == {
        ("c_attn", "kernel", "a"): (12, 3), ("c_attn", "kernel", "b"): (3, 4),
        ("c_fc", "kernel", "a"): (16, 1), ("c_fc", "kernel", "b"): (1, 4),
    }  # fmt: skip


def test_adapters_of_one_shape_differ():
    params = {name: {"attn": {"kernel": np.zeros((4, 4))}} for name in "xy"}
    adapters = init_lora(jax.random.key(0), params, 2, is_attention_kernel)
    x, y = (adapters[name]["attn"]["kernel"]["a"] for name in "xy")
    assert np.abs(x - y).min() > 0


def test_wrong_targets():
    with pytest.raises(ValueError, match="no parameter is a LoRA target"):
        init_lora(jax.random.key(0), PARAMS, 2, lambda path: False)
    with pytest.raises(ValueError, match=r"rank=5 does not fit h/0/attn/c_attn/kernel"):
        init_lora(jax.random.key(0), PARAMS, 5, is_attention_kernel)
    with pytest.raises(ValueError, match="rank=0"):
        init_lora(jax.random.key(0), PARAMS, 0, is_attention_kernel)
    with pytest.raises(ValueError, match="needs a matrix"):
        init_lora(jax.random.key(0), PARAMS, 2, lambda path: path[-1] == "bias")
