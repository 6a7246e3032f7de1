"""A learned polynomial activation in the Chebyshev basis, with tangent tails."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparseffn_jax.ops.elementwise import sum_to

# Returns ``a * b + c`` of arrays and numbers.
MultiplyAdd = Callable[[Any, Any, Any], Any]


def chebyshev(
    u: Float[Array, "*batch m"],
    coefficients: Float[Array, "groups k"],
    *,
    degrees: Sequence[int],
    radius: float,
) -> Float[Array, "*batch m"]:
    """Evaluates ``sum_k c_k T_k(u / radius)``, continued by its tangents beyond ``|u| = radius``.

    The tangents keep the asymptotes of GELU and SiLU and bound the gradient, where a bare
    polynomial explodes on the first outlier. It is evaluated in float32 by Clenshaw's recurrence
    (Clenshaw 1955); terms that ``degrees`` leaves out are not in the program. The backward pass
    stores ``u`` alone and recomputes everything else.

    Args:
      u: pre-activations (..., m), the channels last.
      coefficients: (groups, len(degrees)); one row for each group of ``m / groups`` channels.
      degrees: the kept degrees, ascending; static.
      radius: half the length R > 0 of the interval [-R, R]; static.

    Returns:
      An array of the shape and dtype of ``u``.

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
    return _evaluate(degrees, float(radius), grouped, coefficients.T[..., None]).reshape(u.shape)


def evaluate(
    u: Float[Array, "..."],
    coefficients: Float[Array, "k ..."],
    *,
    degrees: Sequence[int],
    radius: float,
) -> Float[Array, "..."]:
    """Evaluates what :func:`chebyshev` does, for coefficients that broadcast against ``u``.

    Args:
      u: pre-activations of any shape.
      coefficients: one array for every kept degree, each of which broadcasts against ``u``.
      degrees: the kept degrees, ascending; static.
      radius: half the length R > 0 of the interval [-R, R]; static.

    Returns:
      An array of the shape and dtype of ``u``.
    """
    return _evaluate(tuple(degrees), float(radius), u, coefficients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _evaluate(degrees, radius, u, coefficients):
    return _evaluate_forward(degrees, radius, u, coefficients)[0]


def _evaluate_forward(degrees, radius, u, coefficients):
    kept = dict(zip(degrees, coefficients.astype(jnp.float32), strict=True))
    return value(u.astype(jnp.float32), kept, radius).astype(u.dtype), (u, coefficients)


def _evaluate_backward(degrees, radius, stored, dy):
    u, coefficients = stored
    kept = dict(zip(degrees, coefficients.astype(jnp.float32), strict=True))
    du = dy.astype(jnp.float32) * slope(u.astype(jnp.float32), kept, radius)
    terms = functools.partial(weighted_terms, degrees, radius)
    dc = sum_to(coefficients.shape[1:], terms, dy, u)
    return du.astype(u.dtype), jnp.stack(dc).astype(coefficients.dtype)


_evaluate.defvjp(_evaluate_forward, _evaluate_backward)


def multiply_and_add(a: Any, b: Any, c: Any) -> Any:
    """Returns ``a * b + c``; kernels have an instruction for it."""
    return a * b + c


def value(
    u: Float[Array, "..."],
    coefficients: Mapping[int, Any],
    radius: float,
    multiply_add: MultiplyAdd = multiply_and_add,
) -> Float[Array, "..."]:
    """Returns the polynomial's value, without a rule for its derivative.

    Args:
      u: pre-activations of any shape, in float32.
      coefficients: for every kept degree, a coefficient that broadcasts against ``u``.
      radius: half the length R > 0 of the interval [-R, R].
      multiply_add: returns ``a * b + c`` of arrays and numbers.
    """
    y = _clenshaw(_within(u, radius), coefficients, multiply_add)
    # T_k'(1) = k^2 and T_k'(-1) = (-1)^(k+1) k^2.
    right = sum(k**2 * c for k, c in coefficients.items()) / radius
    left = sum((-1) ** (k + 1) * k**2 * c for k, c in coefficients.items()) / radius
    y = multiply_add(right, jnp.maximum(u - radius, 0.0), y)
    return multiply_add(left, jnp.minimum(u + radius, 0.0), y)


def slope(
    u: Float[Array, "..."],
    coefficients: Mapping[int, Any],
    radius: float,
    multiply_add: MultiplyAdd = multiply_and_add,
) -> Float[Array, "..."]:
    """Returns the derivative of :func:`value` by ``u``; the arguments are the same."""
    slopes: dict[int, Any] = {}
    for k, c in coefficients.items():
        # T_k' = 2 k (T_(k-1) + T_(k-3) + ...), T_0 at half weight.
        for j in range(k - 1, -1, -2):
            slopes[j] = slopes.get(j, 0.0) + c * (k if j == 0 else 2 * k) / radius
    if not slopes:
        return jnp.zeros_like(u)
    # Tangents go on with the slope at the ends: that of the clipped argument.
    return _clenshaw(_within(u, radius), slopes, multiply_add)


def weighted_terms(
    degrees: Sequence[int],
    radius: float,
    dy: Float[Array, "..."],
    u: Float[Array, "..."],
    multiply_add: MultiplyAdd = multiply_and_add,
) -> list[Array]:
    """Returns ``dy * T_k(u / radius)`` for every degree k, in float32.

    Summed over activations they are the gradient of the coefficients. ``T_k`` is continued by its
    tangents.

    Args:
      degrees: the kept degrees, ascending.
      radius: half the length R > 0 of the interval [-R, R].
      dy: gradient of the polynomial's values.
      u: pre-activations, of the shape of ``dy``.
      multiply_add: returns ``a * b + c`` of arrays and numbers.
    """
    dy, u = dy.astype(jnp.float32), u.astype(jnp.float32)
    t = _within(u, radius)
    right = jnp.maximum(u - radius, 0.0) * (1.0 / radius)
    left = jnp.minimum(u + radius, 0.0) * (1.0 / radius)
    # T_k'(1) = k^2 and T_k'(-1) = (-1)^(k+1) k^2.
    outside = right - left, right + left
    terms, twice = [jnp.ones_like(t), t], 2.0 * t
    while len(terms) <= degrees[-1]:
        terms.append(multiply_add(twice, terms[-1], -terms[-2]))
    return [dy * multiply_add(k**2, outside[k % 2], terms[k]) if k else dy for k in degrees]


def _within(u: Array, radius: float) -> Array:
    """Returns ``u / radius``, clipped to [-1, 1]."""
    return jnp.clip(u * (1.0 / radius), -1.0, 1.0)


def _clenshaw(t: Array, coefficient: Mapping[int, Any], multiply_add: MultiplyAdd) -> Array:
    """Returns ``sum_k c_k T_k(t)`` (Clenshaw 1955); a missing degree costs no addition."""
    b1, b2, twice = None, None, 2.0 * t
    for k in range(max(coefficient), 0, -1):
        b = coefficient.get(k)
        if b1 is not None:
            b = twice * b1 if b is None else multiply_add(twice, b1, b)
        if b2 is not None:
            b = b - b2
        b1, b2 = b, b1
    if b1 is None:
        return jnp.broadcast_to(coefficient[0], t.shape)
    y = multiply_add(t, b1, coefficient[0]) if 0 in coefficient else t * b1
    return y if b2 is None else y - b2


def basis(u: np.ndarray, degrees: Sequence[int], radius: float) -> np.ndarray:
    """Returns the terms ``T_k(u / radius)`` of :func:`chebyshev`, in float64.

    The activation is linear in its coefficients, so that fitting it to any target is a
    least-squares problem with these terms as its features.

    Args:
      u: pre-activations of any shape.
      degrees: the kept degrees, ascending.
      radius: half the length R > 0 of the interval [-R, R].

    Returns:
      An array of shape ``(*u.shape, len(degrees))``.
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
