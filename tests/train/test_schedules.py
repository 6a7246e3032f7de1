import math

import numpy as np
import pytest

from sparseffn_jax.train.schedules import make_schedule

PEAK, STEPS = 2.0, 20


def after_warmup(name, warmup_steps, count):
    """The rate of the update after ``count`` others, from its definition."""
    share = (count - warmup_steps) / (STEPS - warmup_steps)
    return (
        PEAK
        * {
            "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2,
            "linear": 1 - share,
            "constant": 1.0,
            "wsd": min(1.0, (STEPS - count) / (STEPS / 5)),
        }[name]
    )


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedule(name, warmup_steps):
    schedule = make_schedule(name, PEAK, warmup_steps, STEPS)
    rates = [float(schedule(count)) for count in range(STEPS + 1)]
    rise = np.linspace(PEAK / (warmup_steps + 1), PEAK, warmup_steps + 1)
    after = [after_warmup(name, warmup_steps, count) for count in range(warmup_steps, STEPS + 1)]
    np.testing.assert_allclose(rates, [*rise[:-1], *after], rtol=1e-6, atol=1e-7)
    assert min(rates[:-1]) > 0.0


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_a_stage_of_one_update_has_the_peak(name):
    assert float(make_schedule(name, PEAK, 0, 1)(0)) == PEAK
