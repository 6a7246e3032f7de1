"""How large a SparseFFN may be for a budget of floating-point operations."""

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.costs import dense_flops
from sparseffn_jax.models.spec import DecoderSpec

# Found by search on a small trained GPT-2 at measured speed-ups of 1.5 to 8: the core's share of
# the budget, and the spectral branch's share of the hidden units over the root of the ratio. More
# for the branch costs no loss at equal FLOPs, but more time.
_CORE_SHARE = 0.9
_SPECTRAL_SHARE = 0.3


def size_ffn(
    d_model: int,
    d_ff: int,
    flops_ratio: float,
    activation: str = "gelu_new",
    *,
    gated: bool = False,
    bias: bool = True,
) -> SparseFFNConfig:
    """Returns the configuration of a layer that replaces a dense FFN within a budget of FLOPs.

    Nine tenths of the budget go to the core, which keeps hidden units as they are. The most
    important of the other units share a low-rank branch with a quartic polynomial.

    Args:
      d_model: number of channels in and out.
      d_ff: number of hidden units of the dense FFN.
      flops_ratio: floating-point operations of the layer over those of the dense FFN, above 0 and
        at most 1. The layer does not exceed this ratio; a ratio of 1 returns the dense FFN itself.
      activation: Hugging Face name of the dense FFN's activation.
      gated: whether a hidden unit of the dense FFN is ``phi(gate) * up``.
      bias: whether the dense FFN has biases.

    Raises:
      ValueError: if the ratio is out of range or leaves no room for a component.

    Example:
      >>> import sparseffn_jax as sf
      >>> config = sf.size_ffn(768, 3072, 0.4)
      >>> config.micro.core.width, config.spectral.width, config.spectral.rank
      (1104, 576, 70)
    """
    if not 0.0 < flops_ratio <= 1.0:
        raise ValueError(f"flops_ratio={flops_ratio} must lie above 0 and not above 1")
    if flops_ratio == 1.0:
        whole = MicroRefinementConfig(CoreConfig(d_ff))
        return SparseFFNConfig(d_model, d_ff, activation, micro=whole, gated=gated, bias=bias)
    width = _multiple(_SPECTRAL_SHARE * flops_ratio**0.5 * d_ff)
    polynomial = PolynomialConfig(degree=4)
    # Operations of one unit in the core for each channel, and of one component in the branch.
    each = dense_flops(1, 1, gated)
    # As many units of the core as the branch costs with one component.
    least = (each * (d_model + width) + 3 * polynomial.degree * width) / (each * d_model)
    units = flops_ratio * d_ff
    core = _multiple(max(0.0, min(_CORE_SHARE * units, units - least)))
    width = min(d_ff - core, width)
    rank = affordable_rank(d_model, width, gated, polynomial, d_model * (units - core))
    if rank < 1:
        raise ValueError(
            f"flops_ratio={flops_ratio} leaves no component for d_model={d_model} and "
            f"d_ff={d_ff}: give a larger one"
        )
    return SparseFFNConfig(
        d_model,
        d_ff,
        activation,
        spectral=SpectralConfig("low_rank", width, rank),
        polynomial=polynomial,
        micro=MicroRefinementConfig(CoreConfig(core)),
        gated=gated,
        bias=bias,
    )


def size_model(spec: DecoderSpec, flops_ratio: float) -> SparseFFNConfig:
    """Returns the configuration that :func:`size_ffn` gives to every FFN of a model.

    Args:
      spec: sizes of the model.
      flops_ratio: floating-point operations of a layer over those of the dense FFN.

    Raises:
      ValueError: if the ratio is out of range or leaves no room for a component.
    """
    return size_ffn(
        spec.d_model,
        spec.d_ff,
        flops_ratio,
        spec.activation,
        gated=spec.gated,
        bias=spec.ffn_bias,
    )


def affordable_rank(
    d_model: int,
    width: int,
    gated: bool,
    polynomial: PolynomialConfig | None,
    weights: float,
) -> int:
    """Returns the largest rank of a low-rank branch that a budget pays for, or 0.

    Args:
      d_model: number of channels in and out.
      width: number of hidden units of the branch.
      gated: whether the layer is gated.
      polynomial: the branch's activation; ``None`` costs nothing.
      weights: the budget, as a number of entries of one dense ``(d_model, hidden)`` map.
    """
    each = dense_flops(1, 1, gated)
    left = each * weights
    if polynomial is not None:
        left -= 3 * polynomial.degrees[-1] * width
    rank = int(left / (each * (d_model + width))) if width else 0
    return max(0, min(rank, d_model, width))


def _multiple(value: float, of: int = 16) -> int:
    """Rounds down to a multiple, with which GEMMs are fast; a value below it is truncated."""
    return int(value) // of * of or max(1, int(value))
