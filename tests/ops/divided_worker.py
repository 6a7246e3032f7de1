"""Run by test_divided.py: a kernel divided among eight forced host devices.

It is a program of its own because a process's devices are fixed when JAX starts.
"""

import os

BATCH = ("data", "fsdp")
# Axes of the mesh that divide the tokens, and the hidden units.
PLACES = [(BATCH, "tensor"), (BATCH, None), (None, "tensor"), ("data", BATCH), (None, None)]


def main():
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    for layer in ("gated with biases", "gated polynomial"):
        for place in PLACES:
            divided(layer, *place)
        mapped(layer)
    for place in PLACES:
        circulant("gated with biases", *place)
    circulant("polynomial", *PLACES[0])


def both(activate):
    """Returns a function of a gradient and the layer's operands: the outputs, and the gradients."""
    import jax

    from sparseffn_jax.ops import fused_hidden
    from sparseffn_jax.ops.hidden import Channels

    def function(dz, *given):
        def layer(components, filters, axes, biases, coefficients):
            channels = Channels(tuple(biases), coefficients)
            return fused_hidden.hidden_layer(
                components, filters, axes, activate, channels, interpret=True
            )

        z, pullback = jax.vjp(layer, *given)
        return z, pullback(dz)

    return function


def divided(name, tokens, units):
    """Compares the layer with float64 where both lie over these axes of the mesh."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from numerics import assert_close
    from test_fused_hidden import operands_of, reference

    from sparseffn_jax.train.sharding import make_mesh, parse_mesh

    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    activate, (components, filters, axes, biases, coefficients, dz), exact = operands_of(
        name, "float32"
    )
    of_tokens, of_units, to_units, whole = (
        NamedSharding(mesh, P(*axes)) for axes in ((tokens,), (units,), (None, units), ())
    )
    z, gradients = jax.jit(both(activate))(
        jax.device_put(dz, of_tokens),
        jax.device_put(components, of_tokens),
        jax.device_put(filters, to_units),
        jax.device_put(axes, of_units),
        jax.device_put(biases, of_units),
        None if coefficients is None else jax.device_put(coefficients, whole),
    )
    expected, wanted = reference(activate, *exact)
    where = f"{name}, tokens over {tokens}, units over {units}"
    assert_close(z, expected, what=where)
    assert z.sharding.is_equivalent_to(of_tokens, 2), where
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True)
    for i, (one, other) in enumerate(pairs):
        assert_close(one, other, what=f"{where}, gradient {i}")
    print(where)


def circulant(name, tokens, units):
    """Compares a block-circulant layer with float64 where it lies over these axes of the mesh."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from numerics import assert_close
    from test_fused_circulant import layer_of, operands_of, reference

    from sparseffn_jax.train.sharding import make_mesh, parse_mesh

    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    blocks, activate, (x, filters, biases, coefficients, dy), exact = operands_of(name, "float32")

    @jax.jit
    def both(dy, *given):
        y, pullback = jax.vjp(layer_of(blocks, activate, interpret=True), *given)
        return y, pullback(dy)

    of_tokens, to_units, of_units = (
        NamedSharding(mesh, P(*axes)) for axes in ((tokens,), (None, None, units), (units,))
    )
    y, gradients = both(
        jax.device_put(dy, of_tokens),
        jax.device_put(x, of_tokens),
        jax.device_put(filters, to_units),
        jax.device_put(biases, of_units),
        coefficients,
    )
    expected, wanted = reference(blocks, activate, *exact)
    where = f"circulant, {name}, tokens over {tokens}, units over {units}"
    assert_close(y, expected, what=where)
    assert (*y.sharding.spec, None)[0] == tokens, where
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True)
    for i, (one, other) in enumerate(pairs):
        assert_close(one, other, what=f"{where}, gradient {i}")
    print(where)


def mapped(name):
    """Compares the layer under JAX's vmap and pmap, with tokens that devices do not divide."""
    import jax
    import numpy as np
    from numerics import assert_close
    from test_fused_hidden import operands_of, reference

    activate, (components, *weights, dz), exact = operands_of(name, "float32")
    layer, few = both(activate), [c[:13] for c in components]
    alone, _ = layer(dz[:13], few, *weights)
    assert_close(alone, reference(activate, *exact)[0][:13], what=f"{name}, 13 tokens")
    twice = [np.stack([c, -c]) for c in few]
    both_at_once, _ = jax.vmap(lambda few: layer(dz[:13], few, *weights))(twice)
    assert_close(both_at_once[0], alone, what=f"{name}, mapped")
    eight = [np.broadcast_to(c, (8, *c.shape)) for c in few]
    on_each, _ = jax.pmap(lambda few: layer(dz[:13], few, *weights))(eight)
    assert_close(on_each[7], alone, what=f"{name}, on each device")
    print(f"{name}, mapped")


if __name__ == "__main__":
    main()
