import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.autotune import autotune, time_plans
from sparseffn_jax.nn.sparse_ffn import SparseFFN
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.ops.plans.choice import recorded, use

SCATTERED = BlockMask((4, 4), ((True, False, True), (False, True, True), (True, True, False)))
CONFIG = SparseFFNConfig(
    12,
    12,
    spectral=SpectralConfig("block_circulant", 12, block_size=4),
    micro=MicroRefinementConfig(CoreConfig(12, up_mask=SCATTERED)),
)


def test_every_choice_is_measured_and_the_fastest_goes_into_the_table():
    measured = time_plans(CONFIG, 8, repeats=1)
    assert {times.choice.operator for times in measured} == {
        "block_circulant",
        "block_sparse_matmul",
    }
    for times in measured:
        assert times.choice.plan in times.seconds
        assert times.seconds[times.best] == min(times.seconds.values())
        assert times.loss >= 1.0


@pytest.mark.parametrize("train", [False, True])
def test_a_tuned_layer_runs_by_its_table(train):
    table = autotune(CONFIG, [1, 8], jnp.bfloat16, train=train, repeats=1)
    assert {problem[0] for _, problem in table.plans} == {1, 8}
    x = jnp.ones((8, 12), jnp.bfloat16)
    layer = SparseFFN(CONFIG, dtype=jnp.bfloat16)
    with use(table), recorded() as chosen:
        y, _ = layer.init_with_output(jax.random.key(0), x)
    picked = [choice for choice in chosen if len(choice.costs) > 1]
    assert [c.plan for c in picked] == [table.plans[c.operator, c.problem] for c in picked]
    assert picked
    assert np.isfinite(np.asarray(y, np.float32)).all()


def test_forced_plans_are_left_alone():
    forced = SparseFFNConfig(
        12, 12, spectral=SpectralConfig("block_circulant", 12, block_size=4, implementation="dense")
    )
    assert autotune(forced, [8], repeats=1).plans == {}


def test_forcing_one_plan_leaves_the_others_to_be_tuned():
    correction = BlockMask((4, 4), ((True, False, True), (False, True, True), (True, True, False)))
    core = CoreConfig(12, up_mask=SCATTERED, implementation="gather")
    config = SparseFFNConfig(12, 12, micro=MicroRefinementConfig(core, (correction,)))
    tuned = time_plans(config, 8, repeats=1)
    assert [times.choice.is_forced for times in tuned] == [False]
    both = MicroRefinementConfig(core, (correction,), implementation="gather")
    assert time_plans(SparseFFNConfig(12, 12, micro=both), 8, repeats=1) == []
