"""How large a SparseFFN may be for a budget of floating-point operations."""

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.measure.costs import dense_flops
from sparseffn_jax.models.spec import DecoderSpec

# The share of the FLOPs up to which a bypass earns the units that it costs. Right after a
# conversion it does so up to 0.75, but training gets more out of units: after it the embedded GPT-2
# loses less with a bypass at 0.12 and 0.23 of the FLOPs and as much at 0.45, but SmolLM2-135M loses
# more at 0.47 and 0.57, and at less it has not been measured (docs/concepts/budget.md).
_MOST_WITH_BYPASS = 0.15
# Found by search on both models right after conversion, at FLOPs ratios of 0.1 to 0.8. The more
# units leave, the more of what they did is linear in the inputs: the best rank over d_model grows
# with the share of the FLOPs that is saved. In the smallest layers units must remain.
_RANK_SHARE = 0.4
_BYPASS_SHARE = 0.6
# Sides of a GPU's tiles, and the share of a size that may be given away to fill them. On an H100
# GPT-2's layer gained 1.5x with 1200 joined columns, and a narrow FFN of 1152 units 2.2x
# (campaigns/results).
_TILES, _MOST_LOST, _LARGE_RANK = (128, 64), 1 / 14, 448


def size_ffn(
    d_model: int,
    d_ff: int,
    flops_ratio: float,
    activation: str = "gelu_new",
    *,
    gated: bool = False,
    bias: bool = True,
    bypass: bool | None = None,
) -> SparseFFNConfig:
    """Returns the configuration of a layer that replaces a dense FFN within a budget of FLOPs.

    A core keeps hidden units as they are. Beside it may stand a low-rank bypass, which leads from
    the inputs to the outputs and makes up for what the lost units did in common. A model that is
    not fine-tuned after conversion gains by one at ratios of up to 0.75.

    Args:
      d_model: number of channels in and out.
      d_ff: number of hidden units of the dense FFN.
      flops_ratio: floating-point operations of the layer over those of the dense FFN, above 0 and
        at most 1. The layer does not exceed this ratio; a ratio of 1 returns the dense FFN itself.
      activation: Hugging Face name of the dense FFN's activation.
      gated: whether a hidden unit of the dense FFN is ``phi(gate) * up``.
      bias: whether the dense FFN has biases.
      bypass: whether there is a bypass, if the layer has room for one; ``None`` gives one where it
        pays after fine-tuning, at ratios of up to 0.15.

    Raises:
      ValueError: if the ratio is out of range or leaves no hidden unit.

    Example:
      >>> import sparseffn_jax as sf
      >>> config = sf.size_ffn(768, 3072, 0.4)
      >>> config.micro.core.width
      1216
      >>> config = sf.size_ffn(768, 3072, 0.4, bypass=True)
      >>> config.micro.core.width, config.spectral.rank
      (1040, 176)
    """
    if not 0.0 < flops_ratio <= 1.0:
        raise ValueError(f"flops_ratio={flops_ratio} must lie above 0 and not above 1")
    units = flops_ratio * d_ff
    if units < 1.0:
        raise ValueError(
            f"flops_ratio={flops_ratio} leaves no hidden unit of d_ff={d_ff}: give at least "
            f"{1.0 / d_ff:.3g}"
        )
    if bypass is None:
        bypass = flops_ratio <= _MOST_WITH_BYPASS
    # Two vectors of d_model weights make a component; two make a hidden unit too, or three.
    component = dense_flops(1, 1, gated=False) / dense_flops(1, 1, gated)
    most = min(_RANK_SHARE * (1.0 - flops_ratio) * d_model, _BYPASS_SHARE * units / component)
    rank = _multiple(most) if bypass else 0
    if gated and rank >= _LARGE_RANK:
        rank = int(most) // _TILES[-1] * _TILES[-1]
    if units - rank * component < 1.0:
        rank = 0
    units -= rank * component
    # Joined, units and components are the columns of one product. In a gated layer units are so
    # twice on one side and once on the other: then each has to fill its tiles.
    width = _multiple(units, 0 if gated else rank)
    return SparseFFNConfig(
        d_model,
        d_ff,
        activation,
        spectral=SpectralConfig("low_rank", rank=rank) if rank else None,
        micro=MicroRefinementConfig(CoreConfig(d_ff if flops_ratio == 1.0 else width)),
        gated=gated,
        bias=bias,
    )


def size_model(
    spec: DecoderSpec, flops_ratio: float, *, bypass: bool | None = None
) -> SparseFFNConfig:
    """Returns the configuration that :func:`size_ffn` gives to every FFN of a model.

    Args:
      spec: sizes of the model.
      flops_ratio: floating-point operations of a layer over those of the dense FFN.
      bypass: as in :func:`size_ffn`.

    Raises:
      ValueError: if the ratio is out of range or leaves no hidden unit.
    """
    return size_ffn(
        spec.d_model,
        spec.d_ff,
        flops_ratio,
        spec.activation,
        gated=spec.gated,
        bias=spec.ffn_bias,
        bypass=bypass,
    )


def _multiple(value: float, beside: int = 0) -> int:
    """Rounds down to a size with which GEMMs are fast.

    Large sizes are multiples of a GPU's tiles, others of 16, or of less in a small layer.

    Args:
      value: the number.
      beside: number of columns that lie beside these in a joined product, whose width counts.
    """
    for tile in _TILES:
        if tile <= _MOST_LOST * (value + beside):
            return int(value + beside) // tile * tile - beside
    step = next(step for step in (16, 8, 4, 2, 1) if value >= 4 * step or step == 1)
    return int(value) // step * step
