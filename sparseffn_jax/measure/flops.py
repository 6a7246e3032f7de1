"""Floating-point operations of any JAX function, counted in its jaxpr.

XLA's own ``cost_analysis`` counts the body of a loop once, whatever its trip count, and does not
count custom calls. Here the body of a loop counts as often as it runs, and dead code does not
count. The module :mod:`sparseffn_jax.measure.costs` computes the operations of a layer by formula.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

# One operation for every number that comes out, transcendental functions included.
_ELEMENTWISE = frozenset(
    (
        *("abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh"),
        *("cbrt", "ceil", "clamp", "cos", "cosh", "digamma", "div", "erf", "erf_inv", "erfc"),
        *("exp", "exp2", "expm1", "floor", "integer_pow", "lgamma", "log", "log1p", "logistic"),
        *("max", "min", "mul", "neg", "nextafter", "pow", "rem", "round", "rsqrt", "sign", "sin"),
        *("sinh", "sqrt", "square", "sub", "tan", "tanh"),
    )
)
# One operation for every number that goes in.
_REDUCTIONS = frozenset(
    (
        *("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"),
        *("reduce_max", "reduce_min", "reduce_prod", "reduce_sum"),
    )
)
_SCATTERS = frozenset(("scatter-add", "scatter_add", "scatter-mul", "scatter_mul"))
# Real operations of one complex one.
_COMPLEX_COST = {"mul": 6, "div": 11, "add": 2, "sub": 2, "add_any": 2, "neg": 2}


# The name of a kernel, and the shapes of its inputs.
KernelCall = tuple[str, tuple[tuple[int, ...], ...]]
# Products of queries by keys, or the like, in JAX's kernels for attention, which this library calls
# with a causal mask alone.
_CAUSAL_ATTENTION = {"mha_forward": 2, "mha_backward": 7}


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """The operations of one call of a function, and an upper bound of the bytes that it moves.

    Attributes:
      dot: number of operations of matrix products and convolutions; a multiply-add counts as two, a
        complex one as eight.
      fft: number of operations of fast Fourier transforms, by the convention ``5 N log2(N)``, or
        half of it where inputs or outputs are real.
      elementwise: number of all other floating-point operations: arithmetic, functions and
        reductions count as one for each number. Comparisons, selections, conversions and operations
        on integers do not count.
      bytes_moved: number of bytes that would be read and written if every operation of the program
        took its operands from memory and put its results back. It is an upper bound, because XLA
        fuses most operations.
    """

    dot: int = 0
    fft: int = 0
    elementwise: int = 0
    bytes_moved: int = 0

    @property
    def total(self) -> int:
        """Number of all floating-point operations."""
        return self.dot + self.fft + self.elementwise

    def __add__(self, other: Self) -> Self:
        return self._combine(lambda ours, theirs: ours + theirs, other)

    def __mul__(self, times: int) -> Self:
        return self._combine(lambda ours, _: ours * times, self)

    def _combine(self, operation: Callable[[int, int], int], other: Self) -> Self:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return type(self)(*(operation(*pair) for pair in pairs))


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCount:
    """Counts the operations of ``function(*args, **kwargs)``; nothing is run or allocated.

    The body of a loop counts as often as it runs. A ``cond`` counts as its costliest branch, or as
    the branch for this machine's platform if it chooses by platform. A ``shard_map`` or ``pmap``
    counts once for each device. Intermediate results that no output depends on are not counted, as
    they are not computed under ``jit``.

    Args:
      function: any JAX function; give ``jax.grad(f)`` or ``jax.value_and_grad(f)`` to count
        training.
      *args: positional arguments; ``jax.ShapeDtypeStruct`` may stand for arrays.
      **kwargs: keyword arguments; ``jax.ShapeDtypeStruct`` may stand for arrays.

    Raises:
      ValueError: if a ``while`` loop's trip count is not fixed by the program.
    """
    closed = jax.make_jaxpr(function)(*args, **kwargs)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(live)


def count_kernels(jaxpr: Any) -> dict[KernelCall, FlopCount]:
    """Counts the operations of the Pallas kernels that a program calls, of one call each.

    Args:
      jaxpr: the program, as ``jax.make_jaxpr`` or ``jax.jit(...).trace(...)`` returns it.

    Returns:
      The operations by the call's name and the shapes of its inputs: what the text of the compiled
      program says of it. Kernels whose loops depend on data are left out.
    """
    counts: dict[KernelCall, FlopCount] = {}
    for equation in _open(jaxpr).eqns:
        if equation.primitive.name == "pallas_call":
            shapes = tuple(tuple(variable.aval.shape) for variable in equation.invars)
            name = equation.params["jaxpr"].debug_info.func_name
            with contextlib.suppress(ValueError):
                counts[name, shapes] = _count_equation(equation)
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(_open(inner), "eqns"):
                    counts |= count_kernels(inner)
    return counts


def _count(jaxpr: Any) -> FlopCount:
    total = FlopCount()
    for equation in jaxpr.eqns:
        total += _count_equation(equation)
    return total


def _count_equation(equation: Any) -> FlopCount:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _count(_open(params["jaxpr"])) * params["length"]
    if name == "while":
        return _count(_open(params["body_jaxpr"])) * _trip_count(equation)
    if name == "cond" and params.get("branches_platforms"):
        return _count(_open(_branch_here(params)))
    if name == "cond":
        return max(map(_count, map(_open, params["branches"])), key=lambda count: count.total)
    if name == "shard_map":
        return _count(_open(params["jaxpr"])) * params["mesh"].size
    if name == "pallas_call":
        kernel = params["jaxpr"].debug_info.func_name
        if products := _CAUSAL_ATTENTION.get(kernel):
            # Its loops skip what is masked: half of it, but for the tiles on the diagonal.
            rows, tokens, heads, width = equation.invars[0].aval.shape
            return FlopCount(products * rows * heads * tokens * tokens * width)
        return _count(_open(params["jaxpr"])) * math.prod(params["grid_mapping"].grid)
    moved = sum(map(_bytes, (*equation.invars, *equation.outvars)))
    if name in _SCATTERS:
        # Their jaxpr parameter says how two numbers are combined; it is not a program.
        return FlopCount(elementwise=equation.invars[2].aval.size, bytes_moved=moved)
    if bodies := list(_bodies(params)):
        return sum(map(_count, bodies), FlopCount())
    return FlopCount(*_operations(name, equation), bytes_moved=moved)


def _operations(name: str, equation: Any) -> tuple[int, int, int]:
    """Returns the operations (dot, fft, elementwise) of an equation without a body."""
    if not equation.invars:
        return 0, 0, 0
    operand, out = equation.invars[0].aval, equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(operand.shape[axis] for axis in contracted)
        return _multiply_add(out) * depth * out.size, 0, 0
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return _multiply_add(out) * out.size * (kernel.size // features), 0, 0
    if name == "fft":
        n = math.prod(equation.params["fft_lengths"])
        real = not all(jnp.issubdtype(side.dtype, jnp.complexfloating) for side in (operand, out))
        count = max(operand.size, out.size) // n if real else out.size // n
        return 0, round(5 * n * math.log2(n) * count / (2 if real else 1)), 0
    if not jnp.issubdtype(out.dtype, jnp.inexact):
        return 0, 0, 0
    if name in _ELEMENTWISE:
        is_complex = jnp.issubdtype(out.dtype, jnp.complexfloating)
        return 0, 0, out.size * (_COMPLEX_COST.get(name, 1) if is_complex else 1)
    if name in _REDUCTIONS:
        return 0, 0, operand.size
    return 0, 0, 0


def _multiply_add(out: Any) -> int:
    return 8 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 2


def _branch_here(params: Any) -> Any:
    """Returns the branch of a ``platform_dependent`` that this machine's device runs."""
    device = jax.devices()[0]
    here = {device.platform}
    if device.platform == "gpu":
        here.add("rocm" if "rocm" in device.client.platform_version.lower() else "cuda")
    platforms = params["branches_platforms"]
    fallback = platforms.index(None) if None in platforms else None
    named = (i for i, names in enumerate(platforms) if names and not here.isdisjoint(names))
    return params["branches"][next(named, fallback)]


def _trip_count(equation: Any) -> int:
    """Returns the trip count of a ``while`` that counts up by ones between two static numbers."""
    params = equation.params
    condition, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    carry = equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
    if len(condition.eqns) == 1 and condition.eqns[0].primitive.name == "lt":
        counter, bound = condition.eqns[0].invars
        inputs = condition.invars[params["cond_nconsts"] :]
        index = inputs.index(counter) if counter in inputs else None
        if index is not None and _is_literal(bound) and _is_literal(carry[index]):
            before, after = body.invars[params["body_nconsts"] + index], body.outvars[index]
            if any(_adds_one(step, before, after) for step in body.eqns):
                return max(0, int(bound.val) - int(carry[index].val))
    raise ValueError(
        "cannot count a while loop whose trip count depends on data: use lax.scan, lax.map or "
        "lax.fori_loop with static bounds, or count its body alone"
    )


def _adds_one(step: Any, before: Any, after: Any) -> bool:
    if step.primitive.name != "add" or step.outvars[0] is not after:
        return False
    left, right = step.invars
    return left is before and _is_literal(right) and right.val == 1


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs that a call-like equation (jit, custom_vjp, remat, ...) runs."""
    for value in params.values():
        if hasattr(inner := _open(value), "eqns"):
            yield inner


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _bytes(variable: Any) -> int:
    aval = variable.aval
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0
