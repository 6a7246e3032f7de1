"""Other libraries' products against NumPy: what is timed must be the same product."""

import numpy as np
import pytest

from sparseffn_jax.bench import external
from sparseffn_jax.bench.external import EXTERNAL


def blocks(rng, rows, columns):
    kept = np.kron(rng.random((rows // 8, columns // 8)) < 0.5, np.ones((8, 8)))
    return (rng.standard_normal((rows, columns)) * kept).astype(np.float32)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 32)).astype(np.float32)
    return x, blocks(rng, 32, 64)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("name", EXTERNAL)
def test_computes_the_product(name, arrays):
    peer, (x, weight) = EXTERNAL[name], arrays
    precision = peer.precisions[0]
    if (reason := peer.refusal(precision)) is not None:
        pytest.skip(reason)
    if peer.pattern == "2:4":
        pytest.skip("its weights are pruned first")
    tolerance = {"float32": 1e-4, "bfloat16": 0.1}[precision]
    y = np.asarray(peer.product(weight, x, block=8, precision=precision)())
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight, rtol=tolerance, atol=tolerance)


def test_two_of_four_keeps_the_larger_half_of_every_four_inputs():
    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    pruned = external._two_of_four(torch.from_numpy(weight)).numpy()
    for column, wanted in zip(weight.T.reshape(6, 4, 4), pruned.T.reshape(6, 4, 4), strict=True):
        for group, kept in zip(column, wanted, strict=True):
            larger = np.abs(group) >= np.sort(np.abs(group))[2]
            np.testing.assert_array_equal(kept, group * larger)


def test_says_why_it_cannot_run(arrays, monkeypatch):
    x, weight = arrays
    with pytest.raises(ValueError, match="cannot run: it runs in float32, not in bfloat16"):
        EXTERNAL["jax BCSR"].product(weight, x, precision="bfloat16")
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    with pytest.raises(ValueError, match="it needs a gpu, this is a cpu"):
        EXTERNAL["torch 2:4, compiled"].product(weight, x, precision="bfloat16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="PyTorch is not installed: pip install"):
        EXTERNAL["torch CSR"].product(weight, x)
