import jax
import jax.numpy as jnp
import numpy as np

from sparseffn_jax.measure.memory import peak_device_bytes, program_memory

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
