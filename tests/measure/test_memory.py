import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseffn_jax.measure import memory as measure_memory
from sparseffn_jax.measure.memory import (
    CheckedJit,
    free_bytes,
    peak_device_bytes,
    program_memory,
    program_shortage,
)

X = jax.ShapeDtypeStruct((64, 64), jnp.float32)
BYTES = 4 * 64 * 64


def test_arguments_outputs_and_donation():
    memory = program_memory(lambda x, y: (x + 1.0, x @ y), X, X)
    assert (memory.arguments, memory.aliased) == (2 * BYTES, 0)
    # A tuple's table of pointers comes on top.
    assert 2 * BYTES <= memory.outputs <= 2 * BYTES + 64
    donated = program_memory(lambda x: x + 1.0, X, donate_argnums=0)
    assert donated.aliased == BYTES
    assert donated.total == donated.temporary + BYTES


def test_temporary_bytes_hold_what_the_backward_pass_needs():
    def chain(x, layers):
        for _ in range(layers):
            x = jnp.sin(x @ x)
        return jnp.sum(x)

    short, long = (
        program_memory(jax.grad(lambda x, n=n: chain(x, n)), X).temporary for n in (4, 12)
    )
    # At least each layer's input.
    assert long - short >= 8 * BYTES
    assert long > program_memory(lambda x: chain(x, 12), X).temporary + 8 * BYTES


def test_a_device_that_counts_holds_at_least_its_arrays():
    x = jnp.ones((256, 256))
    peak = peak_device_bytes()
    assert peak is None or peak >= np.prod(x.shape) * 4


def test_what_a_program_lacks_is_known_before_it_runs(monkeypatch):
    compiled = jax.jit(lambda x: jnp.concatenate([x, x])).lower(X).compile()
    assert program_shortage(compiled, "doubling") is None
    monkeypatch.setattr(measure_memory, "free_bytes", lambda device: 2 * BYTES - 1)
    message = "doubling needs 0.00 GiB beside what is loaded, but 0.00 GiB are free"
    assert program_shortage(compiled, "doubling") == message
    # Where the arguments lie, there is no need of them again.
    monkeypatch.setattr(measure_memory, "free_bytes", lambda device: BYTES + 64)
    adding = jax.jit(lambda x, y: x + y).lower(X, X).compile()
    assert program_shortage(adding, "adding") is None


def test_a_checked_function_is_compiled_and_checked_once_a_shape(monkeypatch):
    traced = []

    def double(tree, x):
        traced.append(x.shape)
        return tree["a"] * 2 + x

    def smaller(tree, x):
        return {"size=128": ({"a": tree["a"][:128]}, x[:128])} if len(x) > 128 else {}

    run = CheckedJit(double, "doubling", smaller)
    for size in (3, 3, 5, 3):
        np.testing.assert_array_equal(run({"a": np.ones(size)}, jnp.ones(size)), np.full(size, 3.0))
    assert traced == [(3,), (5,)]
    monkeypatch.setattr(measure_memory, "free_bytes", lambda device: 0)
    run({"a": np.ones(3)}, jnp.ones(3))
    with pytest.raises(MemoryError, match=r"needs .*: nothing is left to be made smaller"):
        run({"a": np.ones(7)}, jnp.ones(7))
    many = np.ones(1 << 27, np.float32)
    with pytest.raises(MemoryError, match=r"needs 0\.50 GiB .*: size=128 would need 0\.00"):
        run({"a": many}, many)


def test_a_cpu_has_the_memory_of_its_machine():
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    assert free_bytes(jax.devices("cpu")[0]) == pytest.approx(1024 * available, rel=0.2)
