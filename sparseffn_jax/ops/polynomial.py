"""A learned polynomial activation in the Chebyshev basis, with tangent tails."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def chebyshev(
    u: Float[Array, "*batch m"],
    coefficients: Float[Array, "groups k"],
    *,
    degrees: Sequence[int],
    radius: float,
) -> Float[Array, "*batch m"]:
    """Evaluates ``sum_k c_k T_k(u / radius)``, continued outside by its tangent lines.

    The tangents keep the asymptotes of GELU and SiLU and bound the gradient; a bare polynomial
    explodes on the first outlier. Evaluated in float32 by Clenshaw's recurrence (Clenshaw 1955);
    terms that ``degrees`` leaves out are not in the program. The backward pass recomputes from
    ``u`` and stores nothing else.

    Args:
      u: pre-activations, the channels last.
      coefficients: one row of ``len(degrees)`` for each group of ``m / groups`` channels.
      degrees: the kept degrees, ascending; static.
      radius: R > 0; static.

    Returns:
      An array like ``u``.

    Raises:
      ValueError: if the coefficients do not fit ``degrees`` or the channels, or ``degrees`` are
        not ascending.
    """
    degrees = tuple(degrees)
    groups, terms = coefficients.shape
    if terms != len(degrees):
        raise ValueError(f"coefficients have {terms} terms, but {len(degrees)} degrees are kept")
    if u.shape[-1] % groups:
        raise ValueError(f"{groups} coefficient groups do not divide {u.shape[-1]} channels")
    if not degrees or min(degrees) < 0 or any(a >= b for a, b in itertools.pairwise(degrees)):
        raise ValueError(f"degrees={degrees}: expected non-negative integers, ascending")
    grouped = u.reshape(*u.shape[:-1], groups, u.shape[-1] // groups)
    # Recomputing from u as it came, not from its float32 copy.
    stored = jax.checkpoint(functools.partial(evaluate, degrees=degrees, radius=radius))
    return stored(grouped, coefficients.T[..., None]).reshape(u.shape)


def evaluate(
    u: Float[Array, "..."],
    coefficients: Float[Array, "k ..."],
    *,
    degrees: Sequence[int],
    radius: float,
) -> Float[Array, "..."]:
    """:func:`chebyshev` for channels in any order, and without a say in what is kept for backward.

    Args:
      u: pre-activations.
      coefficients: for every kept degree an array that broadcasts against ``u``.
      degrees: as in :func:`chebyshev`.
      radius: likewise.
    """
    dtype, u, c = u.dtype, u.astype(jnp.float32), coefficients.astype(jnp.float32)
    coefficient = dict(zip(degrees, c, strict=True))
    inside = jnp.clip(u, -radius, radius)
    t = inside / radius
    b1, b2 = None, None
    for k in range(degrees[-1], 0, -1):
        b = coefficient.get(k)
        if b1 is not None:
            b = 2.0 * t * b1 if b is None else b + 2.0 * t * b1
        if b2 is not None:
            b = b - b2
        b1, b2 = b, b1
    y = 0.0 if b1 is None else t * b1
    if 0 in coefficient:
        y = y + coefficient[0]
    if b2 is not None:
        y = y - b2
    # T_k'(1) = k^2 and T_k'(-1) = (-1)^(k+1) k^2.
    right = sum(k**2 * ck for k, ck in coefficient.items()) / radius
    left = sum((-1) ** (k + 1) * k**2 * ck for k, ck in coefficient.items()) / radius
    # u - inside, not relu: at the ends clip passes on half the gradient, and this the other half.
    y = y + jnp.where(u > 0, right, left) * (u - inside)
    return y.astype(dtype)


def basis(u: np.ndarray, degrees: Sequence[int], radius: float) -> np.ndarray:
    """Returns the float64 terms of :func:`chebyshev`, shape ``(*u.shape, len(degrees))``.

    The activation is linear in its coefficients, so a fit to any target is least squares on this.
    """
    u = np.asarray(u, np.float64)
    inside = np.clip(u, -radius, radius)
    angle = np.arccos(np.clip(inside / radius, -1.0, 1.0))
    columns = []
    for k in degrees:
        # T_k'(1) = k^2 and T_k'(-1) = (-1)^(k+1) k^2.
        slope = np.where(u >= 0, 1.0, (-1.0) ** (k + 1)) * k**2 / radius
        columns.append(np.cos(k * angle) + slope * (u - inside))
    return np.stack(columns, axis=-1)
