"""Sizing against clocks whose answer is known."""

import dataclasses
import math

import pytest

from sparseffn_jax.bench.sizing import Sizer


@dataclasses.dataclass(frozen=True)
class Units:
    """A method with whole units of 1/128 of the FLOPs."""

    count: int

    @property
    def flops_ratio(self):
        return self.count / 128


def size(ratio):
    if int(128 * ratio) < 1:
        raise ValueError("too small")
    return Units(int(128 * ratio))


class Clock:
    """Time as an affine function of the FLOPs, dense = 1."""

    def __init__(self, overhead, slope):
        self.overhead, self.slope, self.calls = overhead, slope, []

    def speedup(self, config):
        return 1.0 / (self.overhead + self.slope * config.flops_ratio)

    def __call__(self, config):
        self.calls.append(config)
        return self.speedup(config)

    def best(self, target):
        """The largest configuration that is fast enough, by trying all."""
        fast = [Units(n) for n in range(1, 129) if self.speedup(Units(n)) >= target]
        return fast[-1] if fast else None


@pytest.mark.parametrize("overhead", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("slope", [0.8, 1.0, 1.5])
def test_lands_at_or_a_little_above_every_target(overhead, slope):
    clock = Clock(overhead, slope)
    sizer = Sizer(size, clock)
    for target in (1.5, 2.0, 4.0, 8.0):
        sized = sizer.meet(target)
        assert sized.speedup == clock.speedup(sized.config) >= target
        one_more = clock.speedup(Units(sized.config.count + 1))
        assert sized.speedup <= 1.06 * target or one_more < target
    assert len(clock.calls) == len(set(clock.calls)) <= 16


def test_a_jump_of_the_clock_does_not_stall_the_search():
    def clock(config):
        return 1.0 / (0.02 + config.flops_ratio + 0.1 * (config.count > 6))

    # Seven units take too long for 8x, six are far faster.
    assert Sizer(size, clock).meet(8.0).config == Units(6)


def test_a_better_measurement_replaces_the_first():
    clock = Clock(overhead=0.05, slope=1.0)
    sizer = Sizer(size, clock)
    first = sizer.meet(2.0)
    sizer.correct(first, 1.9)
    second = sizer.meet(2.0)
    assert second.config.count < first.config.count
    assert second.speedup >= 2.0


def test_a_target_out_of_reach_gives_none():
    clock = Clock(overhead=0.3, slope=1.0)
    sizer = Sizer(size, clock)
    assert clock.best(4.0) is None
    assert sizer.meet(4.0) is None
    assert sizer.meet(2.0).speedup >= 2.0


def test_a_method_faster_than_the_target_at_all_its_flops_stays_whole():
    sized = Sizer(size, Clock(overhead=0.0, slope=0.4)).meet(2.0)
    assert sized.config == Units(128)


def test_a_noisy_clock_does_not_keep_it_from_ending():
    calls = []

    def clock(config):
        calls.append(config)
        return 1.0 / config.flops_ratio * (1.0 + 0.1 * math.sin(97 * config.count))

    assert Sizer(size, clock).meet(3.0).speedup >= 3.0
    assert len(calls) <= 12


def test_a_size_that_missed_by_noise_is_measured_again():
    clock = Clock(overhead=0.0, slope=1.0)
    # With whole sixteenths of the units there is nothing between these two.
    good, slower = Units(16), Units(32)
    first = {good: clock.speedup(good) * 1.3, slower: clock.speedup(slower) * 0.97}
    sizer = Sizer(lambda ratio: slower if ratio >= 0.25 else good, first.__getitem__)
    longer = []

    def measure_longer(config):
        longer.append(config)
        return {"speedup": clock.speedup(config)}

    assert sizer.meet(4.0).config == good
    settled = sizer.settle(4.0, measure_longer)
    assert settled == (slower, {"speedup": 4.0})
    assert longer == [good, slower]


def test_what_is_slower_when_measured_longer_is_not_settled_on():
    clock = Clock(overhead=0.05, slope=1.0)
    sizer = Sizer(size, lambda config: 1.04 * clock(config))
    settled = sizer.settle(2.0, lambda config: {"speedup": clock.speedup(config)})
    assert 2.0 <= settled.times["speedup"] <= 2.0 * 1.06
