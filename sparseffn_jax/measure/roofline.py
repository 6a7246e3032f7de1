"""What the machine allows: its measured peaks, and the time that they set for a layer.

The roofline model (Williams et al. 2009): a program takes at least the time of its arithmetic at
the machine's peak and at least the time of its traffic at the machine's bandwidth.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparseffn_jax.config import SparseFFNConfig, SpectralConfig

# Large enough to be at the peak and larger than any cache, small enough for a second.
_GEMM = {"cpu": 2048, "gpu": 8192}
_STREAM_BYTES = {"cpu": 2**28, "gpu": 2**31}


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one device was measured to reach.

    Attributes:
      device: its kind.
      dtype: of the matrix product.
      flops_per_second: of a large square matrix product.
      bytes_per_second: read and written by a copy that no cache holds.
    """

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one layer's forward pass moves if each stage reads and writes memory once.

    Attributes:
      weights: read.
      activations: the layer's inputs read and outputs written.
      hidden: what lies between its products, written and read again.
    """

    weights: int
    activations: int
    hidden: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.activations + self.hidden


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The bound that a machine's peaks set for one layer's forward pass.

    Attributes:
      flops: of the layer, on nonzeros.
      traffic: bytes moved.
      compute_seconds: of the FLOPs at the peak.
      memory_seconds: of the bytes at the peak.
    """

    flops: int
    traffic: Traffic
    compute_seconds: float
    memory_seconds: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.traffic.total

    @property
    def seconds(self) -> float:
        """The least time: arithmetic and traffic overlap fully."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def is_memory_bound(self) -> bool:
        """Whether the traffic takes longer than the arithmetic."""
        return self.memory_seconds > self.compute_seconds


def measure_peak(dtype: Any = jnp.float32, repeats: int = 5) -> Peak:
    """Measures the default device: a large matrix product, and a copy; about a second each.

    Args:
      dtype: of the product.
      repeats: of both; the median counts.
    """
    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else "gpu"
    n = _GEMM[kind]
    a = jnp.ones((n, n), dtype)
    # A new number in every element, or XLA would return the input itself.
    numbers = jnp.ones(_STREAM_BYTES[kind] // 4, jnp.float32)
    product = _median_seconds(jax.jit(lambda a: a @ a), a, repeats)
    copy = _median_seconds(jax.jit(lambda x: x + 1.0), numbers, repeats)
    return Peak(
        device.device_kind, jnp.dtype(dtype).name, 2 * n**3 / product, 2 * numbers.nbytes / copy
    )


def layer_traffic(config: SparseFFNConfig, tokens: int, dtype: Any = jnp.float32) -> Traffic:
    """Counts the bytes of a layer's forward pass.

    Between products lie, for every token: the hidden units of each branch; of a klt map its
    components; of a dft map the kept frequencies of its inputs and outputs. Elementwise work is
    taken to be fused into the products beside it.

    Args:
      config: of the layer; a core of all hidden units is the dense FFN.
      tokens: rows of the activations.
      dtype: of weights and activations.
    """
    weights, hidden = config.d_model, 0
    if (branch := config.spectral) is not None:
        spectral_weights, between = _spectral_numbers(config, branch)
        weights += spectral_weights + branch.width
        hidden += between + branch.width
    if config.polynomial is not None:
        weights += config.polynomial.groups * len(config.polynomial.degrees)
    if (micro := config.micro) is not None:
        weights += config.flops_per_token()["micro"] // 2
        hidden += len(micro.steps) * config.d_model
        if micro.core is not None:
            weights += micro.core.width
            hidden += micro.core.width
    size = jnp.dtype(dtype).itemsize
    return Traffic(
        weights=size * weights,
        activations=size * 2 * tokens * config.d_model,
        hidden=size * 2 * tokens * hidden,
    )


def roofline(
    config: SparseFFNConfig, tokens: int, peak: Peak, dtype: Any = jnp.float32
) -> Roofline:
    """Returns the bound that measured peaks set for a layer on ``tokens`` rows.

    Raises:
      ValueError: if the peak was measured in another dtype.
    """
    if jnp.dtype(dtype).name != peak.dtype:
        raise ValueError(
            f"the peak was measured in {peak.dtype}, the layer runs in {jnp.dtype(dtype).name}: "
            "measure the peak in the same dtype"
        )
    flops = tokens * sum(config.flops_per_token().values())
    traffic = layer_traffic(config, tokens, dtype)
    return Roofline(
        flops,
        traffic,
        compute_seconds=flops / peak.flops_per_second,
        memory_seconds=traffic.total / peak.bytes_per_second,
    )


def _spectral_numbers(config: SparseFFNConfig, branch: SpectralConfig) -> tuple[int, int]:
    """Returns the stored weights of both maps, and the numbers a token leaves between products."""
    channels = config.d_model + branch.width
    if branch.transform == "klt":
        ranks = branch.rank + (branch.contract_rank or branch.rank)
        return ranks * channels, ranks
    b = branch.block_size
    # DC and Nyquist have no imaginary part.
    components = sum(1 if f in (0, b / 2) else 2 for f in branch.frequencies)
    weights = (config.d_model // b) * (branch.width // b) * components
    # The spectrum of the inputs and of the outputs of both maps.
    return 2 * weights, 2 * (channels // b) * components


def _median_seconds(function: Callable[[Any], Any], argument: Any, repeats: int) -> float:
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(argument))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
