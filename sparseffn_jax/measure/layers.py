"""The parts of one layer's FFN, its costs, and the plans that run it."""

import dataclasses

import jax

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.autotune import FEW_TOKENS
from sparseffn_jax.measure.costs import dense_flops, flops_per_token
from sparseffn_jax.models.decoder import Decoder, ffn_module
from sparseffn_jax.ops.plans.choice import recorded


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """A description of one layer's FFN.

    Attributes:
      parts: one line of text for each part.
      parameters: number of stored numbers.
      flops: floating-point operations of one token's forward pass; a multiply-add counts as two.
      flops_ratio: ``flops`` divided by the operations of the dense FFN.
      plans: pairs (operator, plan) in the order in which they run.
    """

    parts: tuple[str, ...]
    parameters: int
    flops: int
    flops_ratio: float
    plans: tuple[tuple[str, str], ...]


def describe_layer(model: Decoder, layer: int, tokens: int) -> LayerSummary:
    """Describes one layer's FFN as it runs on ``tokens`` rows, without allocating its arrays."""
    spec, module = model.spec, ffn_module(model, layer)
    x = jax.ShapeDtypeStruct((tokens, spec.d_model), model.dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    shapes = variables["params"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    ffn = model.ffns[layer] if model.ffns else None
    if not isinstance(ffn, SparseFFNConfig):
        dense = dense_flops(spec.d_model, spec.d_ff, spec.gated)
        return LayerSummary((f"dense: {spec.d_ff} units",), parameters, dense, 1.0, ())
    flops = sum(flops_per_token(ffn).values())
    if tokens <= FEW_TOKENS:
        # Few tokens are decoded, by weights that are packed before.
        variables = jax.eval_shape(lambda v: module.pack(v, tokens), variables)
    with recorded() as plans:
        jax.eval_shape(module.apply, variables, x)
    chosen = tuple((choice.operator, choice.plan) for choice in plans)
    ratio = flops / dense_flops(spec.d_model, spec.d_ff, spec.gated)
    return LayerSummary(_parts(ffn), parameters, flops, ratio, chosen)


def _parts(ffn: SparseFFNConfig) -> tuple[str, ...]:
    lines, gated = [], ", gated" if ffn.gated else ""
    if (branch := ffn.spectral) is not None:
        if branch.transform == "low_rank":
            kept = f"ranks {branch.rank} and {branch.down_rank or branch.rank}"
            if branch.is_bypass:
                kept = f"rank {branch.rank}"
        else:
            kept = f"b={branch.block_size}, frequencies {','.join(map(str, branch.frequencies))}"
        units = "linear bypass" if branch.is_bypass else f"{branch.width} units{gated}"
        lines.append(f"spectral, {branch.transform.replace('_', ' ')}: {units}, {kept}")
    if (polynomial := ffn.polynomial) is not None:
        lines.append(
            f"polynomial: degrees {','.join(map(str, polynomial.degrees))} within "
            f"{polynomial.radius:g}, {polynomial.groups} group(s)"
        )
    if ffn.micro is not None:
        if (core := ffn.micro.core) is not None:
            densities = [
                1.0 if mask is None else mask.density for mask in (core.up_mask, core.down_mask)
            ]
            kept = f"density {densities[0]:.2f} and {densities[1]:.2f}"
            lines.append(f"core: {core.width} units{gated}, {kept}")
        for mask in ffn.micro.corrections:
            lines.append(f"correction: density {mask.density:.2f}")
    return tuple(lines)
