"""What the numerical tests share: float64 references, tolerances and a look into the jaxpr."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev as npc

DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}


def draw(seed, *shapes, dtype="float32", scale=1.0):
    """Normal arrays of the given shapes in ``dtype``, and the same rounded values in float64."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(scale * rng.standard_normal(shape), dtype) for shape in shapes]
    return arrays, [np.asarray(array, np.float64) for array in arrays]


def assert_close(actual, expected, dtype="float32", what="", factor=1.0):
    """Largest absolute difference over the largest entry of the reference."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    if expected.size:
        error = np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0)
        assert error <= factor * TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


# Small arrays in many shapes: without its optimisations LLVM takes half the time to compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def value_and_vjp(function, arguments, cotangent):
    """The jitted function's value, and its VJP with respect to every argument."""

    @jit
    def both(cotangent, *arguments):
        value, vjp = jax.vjp(function, *arguments)
        return value, vjp(cotangent)

    return both(cotangent, *arguments)


def dot_generals(function, *arguments):
    """``(lhs, rhs, multiply-adds)`` of every matrix product in the function's jaxpr."""
    return list(_dots(jax.make_jaxpr(function)(*arguments).jaxpr))


def _dots(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            lhs, rhs = (variable.aval for variable in equation.invars)
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(lhs.shape[axis] for axis in contracted)
            yield lhs, rhs, depth * math.prod(equation.outvars[0].aval.shape)
        parameters = dict(equation.params)
        if platforms := parameters.pop("branches_platforms", None):
            # Of a platform's branches only one is compiled: here that for CPU.
            (number,) = (i for i, names in enumerate(platforms) if names and "cpu" in names)
            parameters["branches"] = parameters["branches"][number]
        for parameter in parameters.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _dots(inner)


def has_imag(b, frequencies):
    return [f for f in frequencies if f not in (0, b / 2)]


def circulant(x, real, imag, b, frequencies):
    """The block-circulant map from its definition, by np.fft."""
    _, p, q = real.shape
    h = np.zeros((b // 2 + 1, p, q), complex)
    h[list(frequencies)] = real
    h[has_imag(b, frequencies)] += 1j * imag
    spectrum = np.fft.rfft(x.reshape(*x.shape[:-1], p, b))
    y = np.fft.irfft(np.einsum("...pf,fpq->...qf", spectrum, h), n=b)
    return y.reshape(*x.shape[:-1], q * b)


def circulant_reference(x, real, imag, b, frequencies, cotangent):
    """Value and VJP of the block-circulant map, from its definition: it is bilinear."""
    _, p, q = real.shape
    blocks, cotangents = x.reshape(-1, p, b), cotangent.reshape(-1, q, b)

    def gradient(f, value):
        unit = np.zeros(b // 2 + 1, complex)
        unit[f] = value
        through = np.fft.irfft(unit * np.fft.rfft(blocks), n=b)
        return np.einsum("tpn,tqn->pq", through, cotangents)

    matrix = circulant(np.eye(p * b), real, imag, b, frequencies)
    real_bar = np.array([gradient(f, 1.0) for f in frequencies])
    imag_bar = np.array([gradient(f, 1.0j) for f in has_imag(b, frequencies)])
    bars = cotangent @ matrix.T, real_bar, imag_bar.reshape(imag.shape)
    return circulant(x, real, imag, b, frequencies), bars


def tangent_chebyshev(u, k, radius):
    """``T_k(u / radius)`` continued by its tangents, and its derivative."""
    unit = np.eye(k + 1)[k]
    inside = np.clip(u, -radius, radius)
    slope = npc.chebval(inside / radius, npc.chebder(unit)) / radius
    return npc.chebval(inside / radius, unit) + slope * (u - inside), slope


def phi_of(activate, u, coefficients):
    """The elementwise function, its derivative and its terms, in float64."""
    if activate.degrees:
        terms = [tangent_chebyshev(u, k, activate.radius) for k in activate.degrees]
        phi, slope = (
            sum(c * term[i] for c, term in zip(coefficients, terms, strict=True)) for i in (0, 1)
        )
        return phi, slope, [value for value, _ in terms]
    if activate.activation == "tanh":
        return np.tanh(u), 1.0 - np.tanh(u) ** 2, []
    s = 1.0 / (1.0 + np.exp(-u))
    return u * s, s + u * s * (1.0 - s), []


def alive(mask):
    """Where the dense matrix of a block mask lives, entry by entry."""
    return np.kron(np.array(mask.blocks), np.ones(mask.block_shape)) == 1


def dense_of(kernel, mask):
    """The dense matrix of a stored kernel, filled block by block in the documented order."""
    bi, bo = mask.block_shape
    rows, columns = np.nonzero(mask.blocks)
    dense = np.zeros(mask.shape)
    if set(zip(rows, columns, strict=True)) == {(i, j) for i in rows for j in columns}:
        dense[alive(mask)] = kernel.ravel()
        return dense
    for block, (j, i) in zip(kernel, sorted(zip(columns, rows, strict=True)), strict=True):
        dense[i * bi : (i + 1) * bi, j * bo : (j + 1) * bo] = block
    return dense
