"""Losses and gradients against NumPy in float64, and what programs hold and multiply."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import dot_generals
from train_models import make_model
from transformers import GPT2Config

from sparseffn_jax.evaluate import fused_loss, losses
from sparseffn_jax.evaluate.fused_loss import Mixture, Outputs, mean_loss, token_losses
from sparseffn_jax.evaluate.perplexity import make_scorer
from sparseffn_jax.measure.gpus import compile_for, gpus
from sparseffn_jax.models.gpt2 import GPT2LMHeadModel
from sparseffn_jax.nn import head as heads
from sparseffn_jax.nn.head import Head
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.step import init_state, make_stage, make_step

B, T, D, V = 2, 11, 24, 39


def set_chunk(monkeypatch, entries):
    for name in ("_CPU", "_GPU"):
        work = getattr(fused_loss, name)._replace(entries=entries)
        monkeypatch.setattr(fused_loss, name, work)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of two tokens a row and blocks of a few channels, so that there are many of each."""
    set_chunk(monkeypatch, 2 * B * V)
    monkeypatch.setattr(heads, "_WHOLE_ENTRIES", 0)
    monkeypatch.setattr(heads, "_BLOCK_ENTRIES", D * V // 3)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def draw(seed, tied=False, bias=True, dtype=jnp.float32, scale=1.0):
    """Returns outputs whose leaves are exact in ``dtype``, and the same leaves in float64."""
    rng = np.random.default_rng(seed)
    hidden, weight = rng.normal(size=(B, T, D)), scale * rng.normal(size=(V, D) if tied else (D, V))
    leaves = [jnp.asarray(x, dtype) for x in (hidden, weight, rng.normal(size=V))]
    exact = [np.asarray(x, np.float64) for x in leaves]
    if not bias:
        leaves[2], exact[2] = None, np.zeros(V)
    return Outputs(leaves[0], Head(leaves[1], leaves[2], tied, dtype)), exact


def reference(exact, targets, soft=None, weight=0.0, temperature=1.0, tied=False, counted=None):
    """The loss, its cross-entropy and its gradient, from their definitions, in float64."""

    def logits_of(exact):
        hidden, kernel, bias = exact
        return hidden @ (kernel.T if tied else kernel) + bias

    logits, one_hot = logits_of(exact), np.eye(V)[targets]
    shares = np.full(targets.shape, 1 / targets.size) if counted is None else counted
    p = softmax(logits)
    cross_entropy = -(shares * np.log((p * one_hot).sum(-1))).sum()
    loss, slope = (1 - weight) * cross_entropy, (1 - weight) * (p - one_hot)
    if soft is not None:
        p, q = softmax(logits / temperature), softmax(logits_of(soft) / temperature)
        loss += weight * temperature**2 * (shares * (q * np.log(q / p)).sum(-1)).sum()
        slope += weight * temperature * (p - q)
    slope *= shares[..., None]
    kernel = exact[1].T if tied else exact[1]
    of_kernel = np.einsum("btd,btv->dv", exact[0], slope)
    gradient = slope @ kernel.T, of_kernel.T if tied else of_kernel, slope.sum((0, 1))
    return loss, cross_entropy, gradient


def assert_close(actual, expected, tolerance):
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    assert error <= tolerance * np.linalg.norm(expected)


TARGETS = np.random.default_rng(9).integers(0, V, (B, T))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.0)], ids=["ce", "kl", "mixture"]
)
@pytest.mark.parametrize(("shards", "some_count"), [(1, False), (2, False), (2, True)])
def test_loss_and_gradient(small_chunks, tied, weight, temperature, shards, some_count):
    outputs, exact = draw(0, tied)
    teacher, soft = draw(1, tied) if weight else (None, None)
    mixture = Mixture(weight, temperature, shards)
    counted = np.random.default_rng(8).random((B, T)) < 0.3 if some_count else None
    shares = counted / counted.sum() if some_count else None
    weights = np.float32(shares) if some_count else None
    compute = partial(mean_loss, mixture=mixture, weights=weights)
    run = jax.value_and_grad(compute, has_aux=True)
    (loss, cross_entropy), gradient = jax.jit(run)(outputs, TARGETS, teacher)
    expected = reference(exact, TARGETS, soft, weight, temperature, tied, shares)
    np.testing.assert_allclose([loss, cross_entropy], expected[:2], rtol=1e-6)
    for actual, leaf in zip(jax.tree.leaves(gradient), expected[2], strict=True):
        assert_close(actual, leaf, 1e-6)
    if some_count:
        assert not np.any(gradient.hidden[~counted])
    plain = jax.jit(compute)(outputs, TARGETS, teacher)
    np.testing.assert_allclose(plain, (loss, cross_entropy), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_sums_in_float32(small_chunks, dtype, tied):
    outputs, exact = draw(0, tied, bias=False, dtype=dtype)
    teacher, soft = draw(1, tied, bias=False, dtype=dtype)
    # Weights are float32, as those that train are; they are exact in half precision.
    head = outputs.head.replace(weight=outputs.head.weight.astype(jnp.float32))
    run = jax.value_and_grad(partial(mean_loss, mixture=Mixture(0.3, 2.0)), has_aux=True)
    for each in (head, outputs.head):
        (loss, cross_entropy), gradient = jax.jit(run)(
            Outputs(outputs.hidden, each), TARGETS, teacher
        )
        expected = reference(exact, TARGETS, soft, 0.3, 2.0, tied)
        np.testing.assert_allclose([loss, cross_entropy], expected[:2], rtol=1e-6)
        assert gradient.hidden.dtype == dtype
        assert gradient.head.weight.dtype == each.weight.dtype
        # The gradient is rounded once, at its end, to the dtype of what it is for.
        for actual, leaf in zip(jax.tree.leaves(gradient), expected[2], strict=False):
            assert_close(actual, leaf, 1e-6 + 0.5 * float(jnp.finfo(actual.dtype).eps))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 4e-3), (jnp.float16, 5e-4)])
def test_a_gpu_multiplies_slopes_in_bfloat16(small_chunks, monkeypatch, dtype, tolerance, tied):
    monkeypatch.setattr(fused_loss, "_CPU", fused_loss._GPU)
    outputs, exact = draw(0, tied, dtype=dtype)
    outputs = outputs._replace(hidden=outputs.hidden.astype(jnp.float32))
    head = outputs.head.replace(weight=outputs.head.weight.astype(jnp.float32))
    run = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, _), gradient = jax.jit(run)(outputs._replace(head=head), TARGETS)
    expected = reference(exact, TARGETS, tied=tied)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    errors = []
    for actual, leaf in zip(jax.tree.leaves(gradient), expected[2], strict=True):
        assert_close(actual, leaf, tolerance)
        errors.append(np.linalg.norm(np.asarray(actual, np.float64) - leaf))
    # float16 has not the range for slopes, which then stay in float32.
    assert (min(errors[:2]) > 1e-6) == (dtype == jnp.bfloat16)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 2.0)])
def test_words_that_fill_a_gpus_tiles_count_for_nothing(monkeypatch, tied, weight, temperature):
    set_chunk(monkeypatch, 2 * B * V)
    monkeypatch.setattr(fused_loss, "_CPU", fused_loss._GPU)
    # Negative logits: a word that was not masked would be the likeliest one.
    outputs, exact = draw(0, tied)
    outputs = outputs._replace(head=outputs.head.replace(bias=outputs.head.bias - 50.0))
    exact = [*exact[:2], exact[2] - 50.0]
    teacher, soft = draw(1, tied) if weight else (None, None)
    run = jax.value_and_grad(partial(mean_loss, mixture=Mixture(weight, temperature)), has_aux=True)
    (loss, cross_entropy), gradient = jax.jit(run)(outputs, TARGETS, teacher)
    expected = reference(exact, TARGETS, soft, weight, temperature, tied)
    np.testing.assert_allclose([loss, cross_entropy], expected[:2], rtol=1e-5)
    for actual, leaf in zip(jax.tree.leaves(gradient), expected[2], strict=True):
        assert_close(actual, leaf, 1e-5)
    _, is_likeliest = token_losses(outputs, jnp.argmax(outputs.head.logits(outputs.hidden), -1))
    assert is_likeliest.all()


def test_values_at_targets_are_the_same_by_scatter_and_by_comparison():
    slope = jnp.zeros((B, T, V))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(B, T)), jnp.float32)
    expected = np.eye(V)[TARGETS] * np.asarray(values)[..., None]
    for put in (fused_loss._scattered, fused_loss._compared):
        np.testing.assert_array_equal(put(values, jnp.asarray(TARGETS), slope), expected)


def test_a_loss_scale_saves_what_float16_would_round_to_zero():
    outputs, exact = draw(0, dtype=jnp.float16, scale=1e-4)
    _, _, (expected, *_) = reference(exact, TARGETS)

    def scaled(hidden, scale):
        return scale * mean_loss(Outputs(hidden, outputs.head), TARGETS)[0]

    assert np.abs(expected).max() < 1e-4
    gradient = jax.grad(scaled)(outputs.hidden, 2.0**14)
    assert_close(np.asarray(gradient, np.float64) / 2**14, expected, 1e-3)


def test_logits_need_no_head(small_chunks):
    outputs, exact = draw(0)
    logits = outputs.head.logits(outputs.hidden)
    exact_logits = [exact[0] @ exact[1] + exact[2], np.eye(V), np.zeros(V)]
    (loss, _), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
        Outputs(logits, None), TARGETS
    )
    expected = reference(exact_logits, TARGETS)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    assert_close(gradient.hidden, expected[2][0], 1e-6)
    np.testing.assert_allclose(
        token_losses(Outputs(logits, None), TARGETS)[0], token_losses(outputs, TARGETS)[0], 1e-5
    )


def test_each_tokens_loss(small_chunks):
    outputs, exact = draw(0)
    logits = exact[0] @ exact[1] + exact[2]
    targets = np.where(TARGETS % 2, TARGETS, logits.argmax(-1))
    each, is_likeliest = jax.jit(token_losses)(outputs, targets)
    expected = -np.log(np.take_along_axis(softmax(logits), targets[..., None], -1)[..., 0])
    np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(is_likeliest, logits.argmax(-1) == targets)


def test_teacher_and_cross_entropy_get_no_gradient():
    outputs, teacher = draw(0)[0], draw(1)[0]
    run = partial(mean_loss, mixture=Mixture(0.5, 2.0))
    gradient = jax.grad(lambda teacher: run(outputs, TARGETS, teacher)[0])(teacher)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    gradient = jax.grad(lambda outputs: run(outputs, TARGETS, teacher)[1])(outputs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_what_does_not_fit_is_refused():
    outputs, _ = draw(0)
    with pytest.raises(ValueError, match=r"distill_weight=0.0 with teacher='?given"):
        mean_loss(outputs, TARGETS, outputs)
    with pytest.raises(ValueError, match=r"distill_weight=0.5 with teacher=None"):
        mean_loss(outputs, TARGETS, None, Mixture(0.5))
    other = Outputs(outputs.hidden, Head(jnp.zeros((D, V + 1))))
    with pytest.raises(ValueError, match="knows 40 words and the student 39"):
        mean_loss(outputs, TARGETS, other, Mixture(0.5))
    with pytest.raises(ValueError, match="2 rows cannot be dealt out to batch_shards=3"):
        mean_loss(outputs, TARGETS, None, Mixture(batch_shards=3))


# --- What is in the programs --------------------------------------------------------------------

WORDS, WINDOW, ROWS = 12_289, 64, 4


@pytest.fixture
def chunks_of_eight(monkeypatch):
    set_chunk(monkeypatch, ROWS * 8 * WORDS)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def largest_logits(function, *arguments):
    """The most tokens whose logits one array of the program holds."""
    jaxpr = getattr(function, "trace", jax.jit(function).trace)(*arguments).jaxpr.jaxpr
    shapes = [v.aval.shape for e in equations(jaxpr) for v in e.outvars if v.aval.shape]
    # The weight's gradient has as many "tokens" as channels and shards, which are fewer than 8.
    return max(math.prod(shape[:-1]) for shape in shapes if shape[-1] == WORDS)


def wide_model():
    config = GPT2Config(
        vocab_size=WORDS, n_positions=WINDOW, n_embd=8, n_layer=1, n_head=2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return model, jax.eval_shape(model.init, jax.random.key(0), ids)["params"]


BATCH = jax.ShapeDtypeStruct((ROWS, WINDOW + 1), jnp.int32)


def training_step(recipe, distill_weight):
    model, params = wide_model()
    config = TrainConfig(
        recipe=recipe, batch_size=ROWS, distill_weight=distill_weight, temperature=2.0
    )
    stage = make_stage(config, params, 0)
    state, frozen = jax.eval_shape(lambda params: init_state(stage, params), params)
    with_teacher = distill_weight > 0
    step = make_step(model, stage, config, model if with_teacher else None)
    return step, (state, frozen, params if with_teacher else None, BATCH, 0, 0, 1.0)


@pytest.mark.parametrize("distill_weight", [0.0, 0.5])
@pytest.mark.parametrize("recipe", ["full", "ffn_only"])
def test_a_training_step_holds_the_logits_of_a_chunk(chunks_of_eight, recipe, distill_weight):
    step, arguments = training_step(recipe, distill_weight)
    chunk = ROWS * 8 // (2 if distill_weight else 1)
    assert largest_logits(step, *arguments) == chunk
    memory = step.lower(*arguments).compile().memory_analysis()
    # Three arrays of a chunk, the gradient of embedding and head, and what the optimizer computes.
    weights = 2 * 8 * WORDS * (4 if recipe == "full" else 0)
    whole = 4 * ROWS * WINDOW * WORDS
    assert memory.temp_size_in_bytes < 4 * 4 * ROWS * 8 * WORDS + 4 * weights < whole


def test_evaluators_hold_the_logits_of_a_chunk(chunks_of_eight, monkeypatch):
    model, params = wide_model()
    programs = []

    def jit(function):
        programs.append(function)
        return function

    monkeypatch.setattr(jax, "jit", jit)
    losses.make_evaluator(model)
    make_scorer(model, WINDOW, ROWS)
    sum_losses, score_batch = programs
    monkeypatch.undo()
    set_chunk(monkeypatch, ROWS * 8 * WORDS)
    counted = jax.ShapeDtypeStruct((ROWS, WINDOW), bool)
    for program in (sum_losses, score_batch):
        assert largest_logits(program, params, BATCH, counted) == ROWS * 8
        memory = jax.jit(program).lower(params, BATCH, counted).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 3 * 4 * ROWS * 8 * WORDS


@pytest.mark.parametrize(
    ("wanted", "products"), [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3)]
)
def test_only_what_is_wanted_is_multiplied(wanted, products):
    outputs, _ = draw(0)
    leaves = {"hidden": outputs.hidden, "weight": outputs.head.weight}

    def loss(parts, others):
        parts = {**others, **parts}
        head = outputs.head.replace(weight=parts["weight"])
        return mean_loss(Outputs(parts["hidden"], head), TARGETS)[0]

    program = jax.grad(loss) if wanted else loss
    arguments = (
        {name: leaf for name, leaf in leaves.items() if name in wanted},
        {name: leaf for name, leaf in leaves.items() if name not in wanted},
    )
    compiled = jax.jit(program).lower(*arguments).compile()
    assert len(dot_generals(program, *arguments)) == products
    assert products <= compiled.cost_analysis()["flops"] / (2 * B * T * D * V) < products + 0.9


def test_the_head_is_the_models(chunks_of_eight):
    for tied in (False, True):
        model, params = make_model(tie_word_embeddings=tied)
        ids = np.arange(12).reshape(2, 6)
        outputs, _ = losses.forward(model, params, ids)
        logits = model.apply({"params": params}, ids)
        np.testing.assert_array_equal(outputs.head.logits(outputs.hidden), logits)
        assert outputs.vocab_size == logits.shape[-1]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the figures are the CPU compiler's")
@pytest.mark.parametrize("distill_weight", [0.0, 0.5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_vocabulary_needs_little_more_than_the_heads_gradient(dtype, tied, distill_weight):
    # Compiled and not run. The logits alone would be 4.2 GB, the head's gradient is 1.05 GB.
    rows, tokens, width, words = 4, 2048, 2048, 128_256
    hidden = jax.ShapeDtypeStruct((rows, tokens, width), dtype)
    weight = jax.ShapeDtypeStruct((words, width) if tied else (width, words), dtype)
    outputs = Outputs(hidden, Head(weight, tied=tied, dtype=dtype))
    run = jax.value_and_grad(partial(mean_loss, mixture=Mixture(distill_weight, 2.0)), has_aux=True)
    targets = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    teacher = outputs if distill_weight else None
    memory = jax.jit(run).lower(outputs, targets, teacher).compile().memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    print(f"\n{dtype}, tied={tied}, distill_weight={distill_weight}: {needed / 1e9:.2f} GB")
    assert needed < 2e9


def test_a_large_vocabulary_fits_a_gpu_as_well():
    hidden, weight = (
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 2048, 2048), (2048, 128256))
    )
    targets = jax.ShapeDtypeStruct((4, 2048), jnp.int32)

    def loss(hidden, weight, targets):
        outputs = Outputs(hidden, Head(weight, dtype=jnp.bfloat16))
        return mean_loss(outputs, targets)[0]

    program = compile_for(gpus()["h100"], jax.value_and_grad(loss, (0, 1)), hidden, weight, targets)
    assert program.memory.temporary < 2e9
    # Three products in half precision, each of which is done once.
    assert {k.dtype for k in program.kernels if k.matrix_flops} == {"bfloat16"}
    products = sum(k.times * k.matrix_flops for k in program.kernels)
    assert 6 * 8192 * 2048 * 128256 <= products < 1.05 * 6 * 8192 * 2048 * 128256
