"""The transforms of block-circulant kernels, against products with the basis."""

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, draw

from sparseffn_jax.ops.fourier import Spectrum
from sparseffn_jax.ops.fused import arithmetic
from sparseffn_jax.ops.fused_transforms import analyse, synthesise


@pytest.mark.parametrize(
    ("size", "frequencies"),
    [(2, (0, 1)), (2, (1,)), (4, (0, 1, 2)), (8, (1, 3)), (8, (0, 4)), (16, tuple(range(9)))],
)
def test_transforms_are_products_with_the_basis(size, frequencies):
    pairs, single = Spectrum.of(size, frequencies)
    basis = pairs if single is None else np.concatenate([pairs, single], axis=1)
    by = arithmetic(jnp.float32, interpret=True)
    (components, channels), (of_components, of_channels) = draw(
        0, (basis.shape[1], 3, 5), (size, 3, 5)
    )
    given = synthesise(basis, list(components), by)
    assert_close(np.stack(given), np.einsum("bk,k...->b...", basis, of_components))
    given = analyse(basis, list(channels), by)
    assert_close(np.stack(given), np.einsum("bk,b...->k...", basis, of_channels))
