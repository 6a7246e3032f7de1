"""Plans: estimates of damage against NumPy on unseen text, and what trials teach."""

import copy
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import VOCAB, make_model

import sparseffn_jax as sf
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.sparsify.dense import DenseFFN, Linear
from sparseffn_jax.sparsify.fisher import output_fisher
from sparseffn_jax.sparsify.planning import (
    Grid,
    Planner,
    as_served,
    candidates,
    config_of,
    estimate_damages,
    estimate_layers,
    size_grid,
    size_of,
)
from sparseffn_jax.sparsify.streams import LayerActivations
from sparseffn_jax.sparsify.trials import Trial, try_out, try_out_best

TOKENS, D, M = 1200, 6, 20


@pytest.mark.parametrize(
    ("d_model", "d_ff", "width_step", "rank_step"),
    [(256, 1024, 32, 32), (576, 1536, 64, 64), (4096, 14336, 512, 512), (6, 20, 1, 1)],
)
def test_sizes_are_multiples_of_a_power_of_two(d_model, d_ff, width_step, rank_step):
    grid = size_grid(SimpleNamespace(d_model=d_model, d_ff=d_ff))
    assert grid.widths[0] == d_ff
    assert set(grid.widths) == {d_ff, *range(width_step, d_ff, width_step)}
    assert list(grid.widths) == sorted(grid.widths, reverse=True)
    assert grid.ranks == tuple(rank_step * i for i in range(5))


@pytest.mark.parametrize(("gated", "most"), [(False, 14), (True, 16)])
def test_what_costs_as_much_as_the_dense_ffn_is_no_candidate(gated, most):
    spec = SimpleNamespace(d_ff=M, gated=gated)
    widths = range(M, 0, -1)
    found = candidates(spec, Grid(tuple(widths), (0, D)))
    # A bypass of rank 6 has 12 vectors: as many as 6 units have, or 4 of a gated layer.
    narrow = {(width, D) for width in widths if width < most}
    assert set(found) == {(width, 0) for width in widths} | narrow
    assert found[0] == (M, 0)


@pytest.mark.parametrize(("gated", "each"), [(False, 2), (True, 1)])
def test_a_layer_costs_what_its_dense_ffn_does_where_it_is_served(gated, each):
    spec = make_model("llama" if gated else "gpt2")[0].spec
    grid = Grid((spec.d_ff, 64, 40, 8), (0, 6))
    found = candidates(spec, grid, servable=True)
    beside = {(width, 6) for width in (64, 40, 8) if width + 6 * each < spec.d_ff}
    assert set(found) == {(width, 0) for width in grid.widths} | beside
    for width, rank in found[1:]:
        served = as_served(config_of(spec, (width, rank)), spec)
        assert served == config_of(spec, (width + each * rank, 0))
    assert as_served(None, spec) is None
    no_units = dataclasses.replace(spec, activation="tanh", gated=False)
    assert set(candidates(no_units, grid, servable=True)) == {(w, 0) for w in grid.widths}


def draw_layer(bias, seed=0):
    rng = np.random.default_rng(seed)

    def linear(i, o):
        b = rng.standard_normal(o) if bias else np.zeros(o)
        return Linear(*(np.float32(part) for part in (rng.standard_normal((i, o)), b)))

    dense = DenseFFN((linear(D, M),), linear(M, D), "gelu_new")
    x = np.float32(rng.standard_normal((TOKENS, D)) + bias)
    half = rng.standard_normal((D, D))
    return dense, LayerActivations(x, np.asarray(dense(x))), half @ half.T


@pytest.mark.parametrize("bias", [True, False])
def test_damage_is_the_error_on_unseen_tokens(bias):
    dense, activations, fisher = draw_layer(bias)
    grid = Grid((M, 15, 8, 2), (0, 2, D))
    damages = estimate_damages(dense, activations, fisher, grid, centred=bias)
    x, y = (np.float64(part) for part in (activations.x, activations.target))
    hidden = np.float64(dense.hidden([dense.up_maps[0](activations.x)]))
    seen, unseen = slice(0, 900), slice(900, None)

    def error(features):
        features = np.hstack([features, np.ones((TOKENS, int(bias)))])
        weight = np.linalg.lstsq(features[seen], y[seen], rcond=None)[0]
        lost = y[unseen] - features[unseen] @ weight
        return 0.5 * np.einsum("no,op,np->", lost, fisher, lost) / len(lost)

    def fewer(units, bypass):
        """Leaves out one unit after the other, in the metric of the loss."""
        root = np.linalg.cholesky(fisher)
        while True:
            yield units, error(np.hstack([bypass, hidden[:, units]]))
            costs = []
            for unit in units:
                rest = [i for i in units if i != unit]
                features = np.hstack([bypass, hidden[:, rest], np.ones((TOKENS, int(bias)))])[seen]
                fit = np.linalg.lstsq(features, y[seen] @ root, rcond=None)
                costs.append(np.sum(np.square(y[seen] @ root - features @ fit[0])))
            units = [i for i in units if i != units[int(np.argmin(costs))]]

    # Without a bypass, and beside one of full rank, it is known what the layers are made of.
    for rank, bypass in ((0, x[:, :0]), (D, x)):
        for units, wanted in fewer(list(range(M)), bypass):
            if (len(units), rank) in damages and len(units) < M:
                assert damages[len(units), rank] == pytest.approx(wanted, rel=0.02)
            if len(units) == 2:
                break
    assert damages[M, 0] == 0.0
    assert damages.keys() == {(w, r) for w in grid.widths for r in grid.ranks}
    for width in grid.widths[2:]:
        assert damages[width, D] < damages[width, 2] < damages[width, 0]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def planner(request):
    model, params = make_model(request.param)
    windows = np.random.default_rng(0).integers(VOCAB, size=(60, 21))
    fisher = output_fisher(model, params, windows, batch_size=20)
    grid = size_grid(model.spec)
    args = model, params, windows[:, :-1], fisher, grid
    damages = list(estimate_layers(*args, batch_size=20))
    assert list(estimate_layers(*args, batch_size=20, first=1)) == damages[1:]
    # Where nothing is left to estimate, no parameters are read.
    assert not list(estimate_layers(model, {}, *args[2:], first=model.spec.n_layer))
    return model, Planner(model, params, windows[:, :-1], fisher, damages, batch_size=20)


def cost(config):
    return 1.0 if config is None else flops_ratio(config)


def test_a_plan_keeps_to_its_budget_and_converts(planner):
    model, plans = planner
    plan = plans.plan(cost, budget=1.0)
    assert sum(layer.cost for layer in plan.layers) <= 1.0
    assert plan.damage == sum(layer.damage for layer in plan.layers) > 0.0
    for config in plan.configs:
        assert config_of(model.spec, size_of(config, model.spec)) == config
    assert plans.plan(cost, budget=2.0).configs == (None, None)
    assert len(set(plans.plan(cost, budget=1.2, most_shapes=1).configs)) == 1
    with pytest.raises(ValueError, match=r"budget=0\.01 is out of reach"):
        plans.plan(cost, budget=0.01)


def test_a_trial_teaches_what_later_layers_repair(planner):
    model, plans = planner
    seen = []
    grid = size_grid(model.spec)
    configs = [config_of(model.spec, (grid.widths[len(grid.widths) // 2], grid.ranks[1]))] * 2
    np.testing.assert_array_equal(plans.weights, [1.0, 1.0])
    # Of one layer alone nothing can be learnt; what it leaves is what the second one finds.
    (alone,) = try_out([(plans, (configs[0], None))])
    np.testing.assert_array_equal(plans.weights, [1.0, 1.0])
    (both,) = try_out([(plans, tuple(configs))], on_layer=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]
    own = plans._damages[1][size_of(configs[1], model.spec)]
    share = min(max((both.damage - own) / alone.damage, 0.0), 1.0)
    np.testing.assert_allclose(plans.weights, [share**0.5, 1.0], rtol=1e-6)
    first = plans.plan(cost, budget=1.0).layers[0]
    alone = plans._damages[0][size_of(first.config, model.spec)]
    assert first.damage == pytest.approx(share**0.5 * alone)


def test_what_is_repaired_gets_fewer_units(planner):
    _, plans = planner
    usual = plans._left.copy()
    try:
        plans._left[:] = 1.0
        even = [cost(config) for config in plans.plan(cost, budget=1.0).configs]
        plans._left[1] = 0.01
        shifted = [cost(config) for config in plans.plan(cost, budget=1.0).configs]
    finally:
        plans._left[:] = usual
    assert shifted[0] < even[0]
    assert shifted[1] > even[1]


def test_the_damage_left_by_a_trial_is_that_of_the_converted_stream():
    """Of one replaced layer, the damage behind it is that of its own error on unseen tokens."""
    model, params = make_model("gpt2")
    windows = np.random.default_rng(1).integers(VOCAB, size=(80, 21))
    fisher = output_fisher(model, params, windows, batch_size=20)
    size = (64, 8)
    config = config_of(model.spec, size)
    damages = [{(model.spec.d_ff, 0): 0.0, size: 0.0}] * 2
    plans = Planner(model, params, windows[:, :-1], fisher, damages, batch_size=20)
    ((left, loss),) = try_out([(plans, (None, config))])
    tokens = windows[:, :-1]
    first, second = tokens[:60], tokens[60:]
    sparse, leaves = sf.sparsify(model, params, [None, config], first, distill_steps=0)

    def stream(model, params):
        _, state = model.apply(
            {"params": params}, second, capture_intermediates=lambda m, _: m.name == "1"
        )
        (x,) = {leaf.shape: leaf for leaf in jax.tree.leaves(state)}.values()
        return x

    streams = stream(model, params), stream(sparse, leaves)
    lost = np.float64(streams[0] - streams[1]).reshape(-1, model.spec.d_model)
    wanted = 0.5 * np.einsum("no,op,np->", lost, fisher[1], lost) / len(lost)
    assert left == pytest.approx(wanted, rel=1e-2)
    assert loss == pytest.approx(sf.evaluate_loss(sparse, leaves, second, 20), rel=1e-5)


def test_plans_that_are_tried_out_side_by_side_show_what_each_shows_alone(planner):
    model, plans = planner
    grid = size_grid(model.spec)
    wide, slim = (config_of(model.spec, (width, 0)) for width in grid.widths[1:3])
    beside = config_of(model.spec, (grid.widths[-1], grid.ranks[1]))
    # The second begins with a dense layer, the third ends with one.
    every = [(beside, slim), (None, wide), (slim, None)]

    def untaught():
        other = copy.copy(plans)
        other._left = np.ones(model.spec.n_layer)
        return other

    pairs = [(untaught(), configs) for configs in every]
    together = try_out(pairs)
    for (learner, configs), trial in zip(pairs, together, strict=True):
        lone = untaught()
        np.testing.assert_array_equal([trial], try_out([(lone, configs)]))
        np.testing.assert_array_equal(learner.weights, lone.weights)


def test_of_spaces_the_one_whose_trial_loses_least_is_taken(monkeypatch):
    model, params = make_model("gpt2")
    sizes = {(model.spec.d_ff, 0): 0.0, (64, 8): 0.1, (64, 0): 0.104}
    damages = [dict(sizes)] * 2
    windows = np.zeros((4, 5), int)
    full = Planner(model, params, windows, [], damages)
    alone = full.without_bypasses()
    assert full._damages == damages
    assert [list(layer) for layer in alone._damages] == [[(model.spec.d_ff, 0), (64, 0)]] * 2
    tried = []

    def try_out(plans, repair, on_layer):
        tried.extend((planner, configs, repair) for planner, configs in plans)
        bypasses = [
            any(config is not None and config.spectral for config in configs)
            for _, configs in plans
        ]
        return [Trial(0.0, loss[each]) for each in bypasses]

    monkeypatch.setitem(try_out_best.__globals__, "try_out", try_out)

    def plan(planner):
        return planner.plan(cost, budget=1.7)

    loss = {True: 3.0, False: 2.9}
    assert try_out_best([full, alone], plan, repair=0.4) is alone
    assert [each[0] for each in tried] == [full, alone]
    assert {each[2] for each in tried} == {0.4}
    loss = {True: 2.8, False: 2.9}
    assert try_out_best([full, alone], plan) is full
    # What has been tried out is not tried out again.
    tried.clear()
    try_out_best([alone, alone], plan)
    assert len(tried) == 1
    # What is clear without a trial is not tried out, even if it would have lost less there.
    tried.clear()
    loss = {True: 3.0, False: 2.9}
    sizes = sizes | {(64, 0): 0.11}
    clear = Planner(model, params, windows, [], [dict(sizes)] * 2)
    assert try_out_best([clear, clear.without_bypasses()], plan, trials=2) is clear
    assert [each[0] for each in tried] == [clear]
