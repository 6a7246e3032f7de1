"""The choice of one candidate a layer, against all choices that there are."""

import itertools

import numpy as np
import pytest

from sparseffn_jax.config import CoreConfig, MicroRefinementConfig, SparseFFNConfig
from sparseffn_jax.sparsify.budget import Candidate, choose


def config_of_width(width):
    return SparseFFNConfig(8, 32, micro=MicroRefinementConfig(CoreConfig(width)))


CONFIGS = [None, *map(config_of_width, (4, 8, 16))]


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [
        [Candidate(config, scale * rng.uniform(1, 9), rng.exponential()) for config in CONFIGS]
        for _ in range(4)
    ]


def best(layers, value, allowed):
    return min(
        (choice for choice in itertools.product(*layers) if allowed(choice)),
        key=lambda choice: sum(getattr(c, value) for c in choice),
    )


def total(choice, value):
    return sum(getattr(candidate, value) for candidate in choice)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most_shapes", [None, 1, 2])
def test_the_least_damage_within_a_budget(seed, scale, most_shapes):
    layers = draw(seed, scale)
    budget = 26.0 * scale

    def allowed(choice):
        few = most_shapes is None or len({c.config for c in choice}) <= most_shapes
        return few and total(choice, "cost") <= budget

    chosen = choose(layers, budget=budget, most_shapes=most_shapes)
    assert tuple(chosen) == best(layers, "damage", allowed)


@pytest.mark.parametrize("seed", [13, 169])
def test_many_layers_of_evenly_spaced_costs_against_dynamic_programming(seed):
    """Very many choices are nearly as good here, and to prove the best one takes long."""
    rng, n_layer, steps = np.random.default_rng(seed), 30, np.arange(1, 24)
    start, step = rng.uniform(0.0, 0.03), rng.uniform(0.95, 1.0) / 24
    budget = rng.uniform(14.0, 16.0)
    # Layers differ in scale and in how fast their damage falls; the dense one costs no whole step.
    falls = rng.uniform(4.0, 12.0, (n_layer, 1))
    damages = np.exp(-steps / falls) - np.exp(-24 / falls)
    damages *= np.linspace(0.2, 1.0, n_layer)[:, None]
    layers = [
        [Candidate(None, 1.0, 0.0)]
        + [
            Candidate(config_of_width(int(k)), start + step * k, damage)
            for k, damage in zip(steps, row, strict=True)
        ]
        for row in damages
    ]
    chosen = choose(layers, budget=budget)
    assert total(chosen, "cost") <= budget * (1.0 + 1e-9)
    # The least damage with so many dense layers, and so many steps in all.
    least = np.full((n_layer + 1, 24 * n_layer), np.inf)
    least[0, 0] = 0.0
    for row in damages:
        ways = [np.roll(least, 1, axis=0)]
        ways[0][0] = np.inf
        ways += [np.pad(least, ((0, 0), (k, 0)), constant_values=np.inf)[:, :-k] for k in steps]
        ways = [way + damage for way, damage in zip(ways, [0.0, *row], strict=True)]
        least = np.min(ways, axis=0)
    dense, total_steps = np.indices(least.shape)
    costs = dense + (n_layer - dense) * start + total_steps * step
    best_damage = least[costs <= budget].min()
    assert best_damage * (1.0 - 1e-9) <= total(chosen, "damage") <= 1.002 * best_damage


@pytest.mark.parametrize("seed", range(4))
def test_the_least_cost_within_a_loss(seed):
    layers = draw(seed)
    chosen = choose(layers, most_damage=2.0)
    assert tuple(chosen) == best(layers, "cost", lambda c: total(c, "damage") <= 2.0)


def test_limits_out_of_reach_are_refused():
    layers = draw(0)
    least = sum(min(c.cost for c in layer) for layer in layers)
    with pytest.raises(ValueError, match=rf"budget=1 is out of reach: {least:.6g}"):
        choose(layers, budget=1.0)
    with pytest.raises(ValueError, match="most_damage=-1 is out of reach"):
        choose(layers, most_damage=-1.0)
    with pytest.raises(ValueError, match="most_shapes=1"):
        choose(layers, budget=least * 1.001, most_shapes=1)
    with pytest.raises(ValueError, match="not both"):
        choose(layers)


def test_a_limit_is_met_by_its_own_parts():
    """Six times 0.3 is a little less than 0.3 added up six times."""
    layers = [[Candidate(None, 0.3, 0.0)]] * 6
    assert sum(layer[0].cost for layer in layers) > 6 * 0.3
    assert len(choose(layers, budget=6 * 0.3)) == 6
