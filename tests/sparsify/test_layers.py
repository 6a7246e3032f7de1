"""Conversion layer by layer: what each layer is fitted to, resumption, and memory."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import D, make_model

from sparseffn_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from sparseffn_jax.checkpoints.weights import Tensor
from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.models.decoder import block_module, layers_of
from sparseffn_jax.models.families import FAMILIES
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.fit import fit_layer
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.sparsify.streams import Streams

WINDOWS, WINDOW = 48, 12


def tokens_for(model):
    rng = np.random.default_rng(0)
    return rng.integers(model.config.vocab_size, size=(WINDOWS, WINDOW))


def curved(model_and_params):
    """A model whose FFNs matter; freshly drawn ones are nearly linear."""
    model, params = model_and_params
    return model, jax.tree.map(lambda x: x * (6.0 if x.ndim == 2 else 1.0), params)


def all_parts(model):
    branch = SpectralConfig("low_rank", width=model.spec.d_ff // 2, rank=4)
    return dataclasses.replace(narrow(model, 0.4), spectral=branch, polynomial=PolynomialConfig(4))


def narrow(model, share=0.5):
    spec = model.spec
    core = CoreConfig(int(share * spec.d_ff))
    return SparseFFNConfig(
        spec.d_model,
        spec.d_ff,
        spec.activation,
        micro=MicroRefinementConfig(core),
        gated=spec.gated,
        bias=spec.ffn_bias,
    )


def sown(model, params, tokens, layer):
    """Returns a layer's FFN input and output, and the residual stream behind its block."""
    _, state = model.apply({"params": params}, tokens, mutable=["intermediates"])
    body, collection = model.layer_path
    blocks = state["intermediates"][body][collection]
    return (
        *(
            np.asarray(blocks[str(layer)][name][0], np.float64)
            for name in ("ffn_input", "ffn_output")
        ),
        np.asarray(blocks["hidden_states"][layer], np.float64),
    )


@pytest.mark.parametrize("repair", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_fitted_on_what_the_converted_prefix_gives(family, repair):
    model, params = curved(make_model(family))
    tokens, seen = tokens_for(model), {}

    def fit(dense, config, activations):
        seen[len(seen)] = activations
        return fit_layer(dense, config, activations)

    sparse, leaves = sparsify(
        model, params, narrow(model), tokens, fit=fit, distill_steps=0, repair=repair, batch_size=7
    )
    last = model.spec.n_layer - 1
    # The model in which all layers but the last are replaced.
    prefix = sparse.clone(ffns=(*sparse.ffns[:-1], None))
    body, collection = model.layer_path
    blocks = {**leaves[body][collection], str(last): layers_of(model, params)[last]}
    prefix_params = {**leaves, body: {**leaves[body], collection: blocks}}
    x, y, behind = sown(prefix, prefix_params, tokens, last)
    _, _, dense_behind = sown(model, params, tokens, last)
    error = repair * (dense_behind - behind)
    if family == "gemma3_text":
        # What the norm behind the FFN must be given.
        norm = layers_of(model, params)[last]["post_feedforward_layernorm"]
        gain = 1 + np.asarray(norm["weight"], np.float64)
        size = np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)
        error = error * size * gain / (gain**2 + 0.01 * np.mean(gain**2))
    target = y + error
    for actual, expected in ((seen[last].x, x), (seen[last].target, target)):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual.reshape(expected.shape), expected, atol=1e-4 * scale)


@pytest.mark.skipif("gemma3_text" not in FAMILIES, reason="transformers has no Gemma 3")
def test_errors_in_front_of_a_norm():
    model, params = make_model("gemma3_text")
    block, variables = block_module(model, 0), {"params": layers_of(model, params)[0]}
    y, error = np.random.default_rng(0).standard_normal((2, 50, D)).astype(np.float32)
    before, after = (
        block.apply(variables, x, method="behind_ffn")
        for x in (y, y + block.apply(variables, y, 0.01 * error, method="before_norm"))
    )
    missed = np.linalg.norm(after - before - 0.01 * error) / np.linalg.norm(0.01 * error)
    # One of the 32 directions, and what is damped.
    assert missed < 0.25


def test_repair_brings_the_model_nearer_to_the_dense_one():
    model, params = curved(make_model("llama"))
    tokens = tokens_for(model)
    dense = jax.nn.log_softmax(model.apply({"params": params}, tokens))

    def divergence(repair):
        sparse, leaves = sparsify(
            model, params, narrow(model), tokens, distill_steps=0, repair=repair
        )
        ours = jax.nn.log_softmax(sparse.apply({"params": leaves}, tokens))
        return float(jnp.mean(jnp.sum(jnp.exp(dense) * (dense - ours), -1)))

    assert divergence(0.5) < divergence(0.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_and_placement_change_the_result_by_rounding_alone(family):
    model, params = curved(make_model(family))
    tokens, config = tokens_for(model), size_model(model.spec, 0.5, bypass=True)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    options = [
        {"batch_size": 48},
        {"batch_size": 5},
        {"place": functools.partial(jax.device_put, device=sharding)},
    ]
    results = [
        sparsify(model, params, config, tokens, distill_steps=2, **option) for option in options
    ]
    logits = [jax.jit(sparse.apply)({"params": leaves}, tokens[:4]) for sparse, leaves in results]
    for other in logits[1:]:
        assert np.linalg.norm(other - logits[0]) < 1e-3 * np.linalg.norm(logits[0])


def test_streams_can_be_stored_in_half_the_bytes():
    model, params = make_model("llama")
    tokens, stored = tokens_for(model), set()

    def fit(dense, config, activations):
        stored.update((activations.x.dtype, activations.target.dtype))
        return fit_layer(dense, config, activations)

    sparse, leaves = sparsify(
        model, params, narrow(model), tokens, fit=fit, distill_steps=0, stream_dtype=jnp.bfloat16
    )
    assert stored == {jnp.dtype(jnp.bfloat16)}
    exact, exact_leaves = sparsify(model, params, narrow(model), tokens, distill_steps=0)
    logits = [m.apply({"params": p}, tokens) for m, p in ((sparse, leaves), (exact, exact_leaves))]
    assert np.linalg.norm(logits[0] - logits[1]) < 0.1 * np.linalg.norm(logits[1])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_activations_that_are_not_finite_are_refused(tmp_path):
    model, params = curved(make_model("llama"))
    tokens = tokens_for(model)
    loud = jax.tree.map(lambda x: x, params)
    loud["model"]["embed_tokens"]["embedding"] *= 1e9
    folder, other = tmp_path / "partial", tmp_path / "other"
    message = "activations of layer 0 are not finite in float16: take bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        sparsify(model, loud, narrow(model), tokens, stream_dtype=np.float16, work_dir=folder)
    assert not list(folder.glob("*.safetensors"))

    def fit(dense, config, activations):
        fitted, leaves = fit_layer(dense, config, activations)
        return fitted, jax.tree.map(lambda leaf: leaf * np.nan, leaves)

    with pytest.raises(ValueError, match="what layer 0 was fitted to is not finite in float32"):
        sparsify(model, params, narrow(model), tokens, fit=fit, distill_steps=0, work_dir=other)
    assert not list(other.glob("*.safetensors"))


@pytest.mark.parametrize("on_host", [True, False])
def test_new_weights_lie_where_the_old_ones_did(on_host):
    """On a GPU, what lay in host memory would be sent with every call."""
    model, params = make_model("gpt2")
    if on_host:
        params = jax.tree.map(np.asarray, params)
    _, leaves = sparsify(model, params, narrow(model), tokens_for(model), distill_steps=1)
    kinds = {isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(leaves)}
    assert kinds == {on_host}


def test_distillation_never_leaves_a_layer_worse():
    """Adam's first steps lead away from the least squared error."""
    model, params = curved(make_model("gpt2"))
    tokens, errors = tokens_for(model), []
    for steps in (0, 1, 60):
        layers = []
        sparsify(model, params, narrow(model), tokens, distill_steps=steps, on_layer=layers.append)
        errors.append(layers[0].error)
    assert errors[1] == errors[0]
    assert errors[2] < errors[0]


def test_layers_that_are_alike_are_compiled_once(monkeypatch):
    model, params = make_model("gpt2")
    traced = []
    apply = SparseFFN.__call__
    monkeypatch.setattr(
        SparseFFN, "__call__", lambda self, x: traced.append(x.shape) or apply(self, x)
    )
    sparsify(model, params, narrow(model, 0.3), tokens_for(model), distill_steps=2)
    # The step, its loss, and the forward pass.
    assert model.spec.n_layer > 1
    assert len(traced) == 3


class Stop(Exception):
    pass


def stopped(model, params, tokens, folder, **options):
    """Runs a conversion into ``folder`` that is stopped after the first layer."""

    def on_layer(layer):
        raise Stop

    with pytest.raises(Stop):
        sparsify(
            model, params, narrow(model), tokens, work_dir=folder, on_layer=on_layer, **options
        )


def test_a_stopped_conversion_goes_on_to_the_same_bits(tmp_path):
    model, params = make_model("gpt2")
    tokens, folder = tokens_for(model), tmp_path / "partial"
    options = {"distill_steps": 3}
    whole = sparsify(model, params, narrow(model), tokens, **options)
    stopped(model, params, tokens, folder, **options)
    fitted = []

    def fit(dense, config, activations):
        fitted.append(dense)
        return fit_layer(dense, config, activations)

    fit.__name__ = fit_layer.__name__
    resumed = sparsify(model, params, narrow(model), tokens, fit=fit, work_dir=folder, **options)
    assert len(fitted) == model.spec.n_layer - 1
    assert resumed[0].ffns == whole[0].ffns
    jax.tree.map(np.testing.assert_array_equal, resumed[1], whole[1])


@pytest.mark.parametrize(
    ("harm", "dtype"),
    [
        *(("none", dtype) for dtype in ("float32", "bfloat16")),
        *((harm, "float32") for harm in ("cut", "gone", "no room")),
    ],
)
def test_a_stopped_conversion_takes_the_text_through_no_layer_twice(
    tmp_path, monkeypatch, harm, dtype
):
    model, params = make_model("gpt2")
    tokens, folder = tokens_for(model), tmp_path / "partial"
    options, seen = {"distill_steps": 0, "stream_dtype": jnp.dtype(dtype)}, ([], [])
    whole = sparsify(model, params, narrow(model), tokens, on_layer=seen[0].append, **options)
    with monkeypatch.context() as patch:
        if harm == "no room":

            def full(file, array, **_):
                Path(file).write_bytes(b"")
                raise OSError(28, "No space left on device")

            patch.setattr(np, "save", full)
        stopped(model, params, tokens, folder, **options)
    (streams,) = list(folder.glob("streams-*")) or [None]
    assert (streams is None) == (harm == "no room")
    if harm == "cut":
        file = streams / "1.npy"
        file.write_bytes(file.read_bytes()[:-1])
    if harm == "gone":
        shutil.rmtree(streams)
    reached, reach = [], Streams.reach
    monkeypatch.setattr(
        Streams, "reach", lambda self, i, *rest: reached.append(i) or reach(self, i, *rest)
    )
    resumed = sparsify(
        *(model, params, narrow(model), tokens),
        **{"work_dir": folder, "on_layer": seen[1].append, **options},
    )
    assert reached == list(range(harm == "none", model.spec.n_layer))
    jax.tree.map(np.testing.assert_array_equal, resumed[1], whole[1])
    assert [each[:2] for each in seen[0]] == [each[:2] for each in seen[1]]
    # Those behind the last layer alone are kept.
    assert [path.name for path in folder.glob("streams-*")] == [
        f"streams-{model.spec.n_layer - 1:04d}"
    ]


def test_what_another_conversion_left_is_refused_and_kept(tmp_path):
    model, params = make_model("gpt2")
    tokens, folder = tokens_for(model), tmp_path / "partial"
    stopped(model, params, tokens, folder, distill_steps=0)

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    again = functools.partial(sparsify, model, config=narrow(model), work_dir=folder)
    with pytest.raises(ValueError, match=r"other settings \(distill_steps, seed\)"):
        again(params, calibration=tokens, distill_steps=1, seed=3)
    with pytest.raises(ValueError, match=r"other settings \(calibration\)"):
        again(params, calibration=tokens[::-1], distill_steps=0)
    other = jax.tree.map(lambda x: x + 1e-3, params)
    with pytest.raises(ValueError, match=r"of other weights \(layer 0 differs\)"):
        again(other, calibration=tokens, distill_steps=0)
    assert files() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no settings"):
        sparsify(model, params, narrow(model), tokens, work_dir=tmp_path / "mine")


def test_a_damaged_layer_is_converted_again(tmp_path):
    model, params = make_model("gpt2")
    tokens, folder = tokens_for(model), tmp_path / "partial"
    stopped(model, params, tokens, folder, distill_steps=0)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    resumed = sparsify(model, params, narrow(model), tokens, work_dir=folder, distill_steps=0)
    whole = sparsify(model, params, narrow(model), tokens, distill_steps=0)
    jax.tree.map(np.testing.assert_array_equal, resumed[1], whole[1])


@pytest.mark.parametrize("repair", [-0.1, 1.5, float("nan")])
def test_repair_is_a_share(repair):
    model, params = make_model("gpt2")
    with pytest.raises(ValueError, match=f"repair={repair} must be between 0 and 1"):
        sparsify(model, params, narrow(model), tokens_for(model), repair=repair)


def test_layers_that_stay_dense_are_passed_through():
    model, params = curved(make_model("llama"))
    tokens, seen = tokens_for(model), []

    def fit(dense, config, activations):
        seen.append(activations)
        return fit_layer(dense, config, activations)

    config = narrow(model)
    for layers in ((config, None), (None, config)):
        sparse, leaves = sparsify(
            model, params, layers, tokens, fit=fit, distill_steps=0, repair=0.5
        )
        assert [ffn is not None for ffn in sparse.ffns] == [layer is not None for layer in layers]
        replaced = layers.index(config)
        untouched = layers_of(model, leaves)[1 - replaced]
        jax.tree.map(
            np.testing.assert_array_equal, untouched, layers_of(model, params)[1 - replaced]
        )
    # The second layer, alone replaced, is fitted on the dense model's own inputs and outputs.
    x, y, _ = sown(model, params, tokens, 1)
    for actual, expected in ((seen[1].x, x), (seen[1].target, y)):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual.reshape(expected.shape), expected, atol=1e-4 * scale)


def test_configs_hold_what_a_layer_was_fitted_with(tmp_path):
    """A polynomial's radius is found by the fit, and kept with the layer."""
    model, params = curved(make_model("gpt2"))
    tokens = tokens_for(model)
    config = all_parts(model)
    folder = tmp_path / "partial"
    first = sparsify(model, params, config, tokens, distill_steps=0, work_dir=folder)
    again = sparsify(model, params, config, tokens, distill_steps=0, work_dir=folder)
    assert first[0].ffns == again[0].ffns
    assert first[0].ffns[0].polynomial.radius != config.polynomial.radius


@pytest.mark.parametrize("kept", [False, True])
def test_weights_on_demand_are_read_one_layer_at_a_time(tmp_path, kept):
    model, params = make_model("llama", dtype=jnp.float32)
    save_pretrained(tmp_path / "dense", model, params)
    loaded = load_pretrained(tmp_path / "dense", on_demand=True)
    reads, fitted_after = [], []

    def watched(path, leaf):
        def read():
            reads.append(jax.tree_util.keystr(path))
            return leaf.read()

        return dataclasses.replace(leaf, read=read)

    watched_params = jax.tree_util.tree_map_with_path(watched, loaded.params)

    def fit(dense, config, activations):
        fitted_after.append(len([path for path in reads if "'1'" in path]))
        return fit_layer(dense, config, activations)

    tokens = tokens_for(model)
    sparse, leaves = sparsify(
        loaded.model(), watched_params, narrow(model), tokens, fit=fit, distill_steps=0,
        work_dir=tmp_path / "partial" if kept else None,
    )  # fmt: skip
    new = jax.tree.leaves([layer["mlp"] for layer in layers_of(model, leaves)])
    assert all(isinstance(leaf, Tensor) == kept for leaf in new)
    # The second layer is not read before the first one is fitted, and the head never is.
    assert fitted_after[0] == 0 < fitted_after[1]
    assert not any("lm_head" in path for path in reads)
    save_pretrained(tmp_path / "sparse", sparse, leaves)
    expected = sparsify(model, params, narrow(model), tokens, distill_steps=0)
    actual = load_pretrained(tmp_path / "sparse").params
    jax.tree.map(np.testing.assert_array_equal, actual, expected[1])
