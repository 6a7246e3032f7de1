"""What a layer's sizes cost on a GPU, which multiplies whole tiles."""

import functools
import warnings

from sparseffn_jax.config import SparseFFNConfig

# Matrix products are fastest in tiles of so many hidden units, and of so many components, the
# least that tensor cores sum over in half precision.
_UNITS, _COMPONENTS = 128, 16
_MOST = 0.1


def padding_share(config: SparseFFNConfig) -> float:
    """Returns what tiles add to a layer's multiply-adds, over these.

    Counted are hidden units and components, which the configuration sets; channels are the model's.
    Masks of blocks are left as they are, for their plans gather what tiles multiply, and so are
    block-circulant maps.

    Args:
      config: configuration of the layer.

    Example:
      >>> import sparseffn_jax as sf
      >>> core = sf.MicroRefinementConfig(core=sf.CoreConfig(width=64))
      >>> padding_share(sf.SparseFFNConfig(768, 3072, micro=core))
      1.0
    """
    exact = padded = 0
    d, maps = config.d_model, len(config.up_maps)
    if config.micro is not None and (core := config.micro.core) is not None:
        core = core.without_dead_units()
        if core.up_mask is None and core.down_mask is None:
            exact += (maps + 1) * d * core.width
            padded += (maps + 1) * d * _up(core.width, _UNITS)
    if (branch := config.spectral) is not None and branch.transform == "low_rank":
        ranks = [branch.rank]
        if not branch.is_bypass:
            ranks = [branch.rank] * maps + [branch.down_rank or branch.rank]
        exact += sum(ranks) * (d + (branch.width or d))
        padded += sum(_up(rank, _COMPONENTS) for rank in ranks) * (
            d + (_up(branch.width, _UNITS) or d)
        )
    return padded / exact - 1.0 if exact else 0.0


@functools.cache
def warn_of_padding(config: SparseFFNConfig) -> None:
    """Warns, once for each configuration, of sizes for which tiles add more than a tenth.

    Args:
      config: configuration of the layer.
    """
    if (share := padding_share(config)) > _MOST:
        sizes = []
        if config.micro is not None and config.micro.core is not None:
            sizes.append(f"core width={config.micro.core.without_dead_units().width}")
        if (branch := config.spectral) is not None:
            ranks = {"spectral width": branch.width, "rank": branch.rank}
            sizes += [f"{name}={size}" for name, size in ranks.items() if size]
        warnings.warn(
            f"a GPU multiplies whole tiles, which adds {share:.0%} to the products of a layer with "
            f"{', '.join(sizes)}: take multiples of {_UNITS} for widths, of {_COMPONENTS} for "
            "ranks",
            stacklevel=2,
        )


def _up(size: int, multiple: int) -> int:
    return multiple * -(-size // multiple)
