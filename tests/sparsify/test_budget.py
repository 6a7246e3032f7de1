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


def test_many_layers_of_evenly_spaced_costs_against_dynamic_programming():
    """To prove the best of very many choices that are nearly as good once took minutes."""
    rng, steps = np.random.default_rng(0), np.arange(1, 25)
    layers, start, step, budget = 30, 0.0137, 0.9712 / 24, 18.0
    # Layers differ in scale and in how fast their damage falls; the front ones count for less.
    falls = rng.uniform(4.0, 12.0, (layers, 1))
    noise = 1.0 + 0.02 * rng.standard_normal((layers, 24))
    damages = np.linspace(0.2, 1.0, layers)[:, None] * np.exp(-steps / falls) * noise
    candidates = [
        [
            Candidate(config_of_width(int(k)), start + step * k, damage)
            for k, damage in zip(steps, row, strict=True)
        ]
        for row in damages
    ]
    chosen = choose(candidates, budget=budget)
    assert total(chosen, "cost") <= budget * (1.0 + 1e-9)
    # The least sum of damages with so many steps in all.
    most = int((budget - layers * start) / step)
    least = np.full(most + 1, np.inf)
    least[0] = 0.0
    for row in damages:
        added = [np.append(np.full(k, np.inf), least[:-k]) + row[k - 1] for k in steps]
        least = np.min(added, axis=0)
    assert least.min() <= total(chosen, "damage") <= 1.001 * least.min()


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
