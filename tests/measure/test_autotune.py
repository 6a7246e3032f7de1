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
from sparseffn_jax.ops import planning
from sparseffn_jax.ops.block_sparse import BlockMask

FREE = BlockMask((4, 4), ((True, False, True), (False, True, True), (True, True, False)))
CONFIG = SparseFFNConfig(
    12,
    12,
    spectral=SpectralConfig("dft", 12, block_size=4),
    micro=MicroRefinementConfig(CoreConfig(12, expand_mask=FREE)),
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
    with planning.use(table), planning.recorded() as chosen:
        y, _ = layer.init_with_output(jax.random.key(0), x)
    plans = [choice.plan for choice in chosen if len(choice.costs) > 1]
    assert plans == [table.plans[c.operator, c.problem] for c in chosen if len(c.costs) > 1]
    assert np.isfinite(np.asarray(y, np.float32)).all()


def test_forced_plans_are_left_alone():
    forced = SparseFFNConfig(
        12, 12, spectral=SpectralConfig("dft", 12, block_size=4, implementation="dense")
    )
    assert autotune(forced, [8], repeats=1).plans == {}
