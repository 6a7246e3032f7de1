"""What a layer's sizes cost on a GPU, which multiplies whole tiles."""

import functools
import warnings

from sparseffn_jax.config import SparseFFNConfig

# Tiles of matrix products have so many columns, and sum over multiples of so many rows, the least
# that tensor cores take in half precision; a low rank's columns are cut as finely.
_COLUMNS, _ROWS = 128, 16
_MOST = 0.1


def padding_share(config: SparseFFNConfig) -> float:
    """Returns what tiles add to a layer's multiply-adds, over these.

    Counted are hidden units and components, which the configuration sets; channels are the model's.
    A dense core and a low-rank bypass share their products. Masks of blocks are left as they are,
    for their plans gather what tiles multiply, and so are block-circulant maps.

    Args:
      config: configuration of the layer.

    Example:
      >>> import sparseffn_jax as sf
      >>> core = sf.MicroRefinementConfig(core=sf.CoreConfig(width=64))
      >>> padding_share(sf.SparseFFNConfig(768, 3072, micro=core))
      0.5
    """
    exact = padded = 0
    d, maps, branch = config.d_model, len(config.up_maps), config.spectral
    if branch is not None and branch.transform != "low_rank":
        branch = None
    core = None if config.micro is None else config.micro.core
    if core is not None:
        core = core.without_dead_units()
        if core.up_mask is None and core.down_mask is None:
            shared = branch.rank if branch is not None and branch.is_bypass else 0
            into, out_of = maps * core.width + shared, core.width + shared
            exact += d * (into + out_of)
            columns = _up(into, _COLUMNS) if shared else maps * _up(core.width, _COLUMNS)
            padded += d * (columns + _up(out_of, _ROWS))
            branch = None if shared else branch
    if branch is None:
        return padded / exact - 1.0 if exact else 0.0
    if branch.is_bypass:
        exact += 2 * d * branch.rank
        padded += 2 * d * _up(branch.rank, _ROWS)
    else:
        down, width = branch.down_rank or branch.rank, branch.width
        exact += (maps * branch.rank + down) * (d + width)
        padded += maps * _up(branch.rank, _ROWS) * (d + _up(width, _COLUMNS))
        padded += _up(down, _ROWS) * (d + _up(width, _ROWS))
    return padded / exact - 1.0


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
            f"{', '.join(sizes)}: take widths that are multiples of {_COLUMNS}, together with the "
            f"rank of a bypass, and ranks that are multiples of {_ROWS}",
            stacklevel=2,
        )


def _up(size: int, multiple: int) -> int:
    return multiple * -(-size // multiple)
