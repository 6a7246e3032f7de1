"""The bound that a machine sets: its measured peaks, and the least time of a layer on it.

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

from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.costs import count_numbers, flops_per_token

# Large enough to be at the peak and larger than any cache, small enough for a second.
_GEMM = {"cpu": 2048, "gpu": 8192}
_STREAM_BYTES = {"cpu": 2**28, "gpu": 2**31}


@dataclasses.dataclass(frozen=True)
class Peak:
    """The measured peak performance of one device.

    Attributes:
      device: kind of the device, as JAX names it.
      dtype: dtype of the matrix product.
      flops_per_second: floating-point operations per second of a large square matrix product.
      bytes_per_second: bytes per second, read and written, of a copy that is larger than any cache.
    """

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one layer's forward pass moves if each stage reads and writes memory once.

    Attributes:
      weights: bytes of the weights, which are read once.
      activations: bytes of the layer's inputs, which are read, and of its outputs, which are
        written.
      hidden: bytes of the intermediate results between its products, which are written and read
        again.
    """

    weights: int
    activations: int
    hidden: int

    @property
    def total(self) -> int:
        """Number of all bytes."""
        return self.weights + self.activations + self.hidden


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The bound that a machine's peaks set for one layer's forward pass.

    Attributes:
      flops: floating-point operations of the layer, counted on nonzeros.
      traffic: bytes that the layer moves.
      compute_seconds: time of the operations at the machine's peak, in seconds.
      memory_seconds: time of the traffic at the machine's bandwidth, in seconds.
    """

    flops: int
    traffic: Traffic
    compute_seconds: float
    memory_seconds: float

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, in floating-point operations per byte."""
        return self.flops / self.traffic.total

    @property
    def seconds(self) -> float:
        """The least time in seconds, which is reached if arithmetic and traffic overlap fully."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def is_memory_bound(self) -> bool:
        """Whether the traffic takes longer than the arithmetic."""
        return self.memory_seconds > self.compute_seconds


def measure_peak(dtype: Any = jnp.float32, repeats: int = 5) -> Peak:
    """Measures the peak performance of the default device.

    It times a large matrix product and a large copy, which take about a second each.

    Args:
      dtype: dtype of the matrix product.
      repeats: number of runs of each; the median counts.
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
    """Counts the bytes that a layer's forward pass moves.

    Every weight is read once. The intermediate results between products, which
    :func:`sparseffn_jax.measure.costs.count_numbers` counts, are written once and read once.

    Args:
      config: configuration of the layer; a dense core with all hidden units is the dense FFN.
      tokens: number of rows of the activations.
      dtype: dtype of weights and activations.
    """
    numbers = count_numbers(config)
    size = jnp.dtype(dtype).itemsize
    return Traffic(
        weights=size * numbers.weights,
        activations=size * 2 * tokens * config.d_model,
        hidden=size * 2 * tokens * numbers.between,
    )


def roofline(
    config: SparseFFNConfig, tokens: int, peak: Peak, dtype: Any = jnp.float32
) -> Roofline:
    """Returns the bound that measured peaks set for a layer's forward pass.

    Args:
      config: configuration of the layer; a dense core with all hidden units is the dense FFN.
      tokens: number of rows of the activations.
      peak: the machine's measured peaks.
      dtype: dtype of weights and activations.

    Raises:
      ValueError: if the peak was measured in another dtype.
    """
    if jnp.dtype(dtype).name != peak.dtype:
        raise ValueError(
            f"the peak was measured in {peak.dtype}, the layer runs in {jnp.dtype(dtype).name}: "
            "measure the peak in the same dtype"
        )
    flops = tokens * sum(flops_per_token(config).values())
    traffic = layer_traffic(config, tokens, dtype)
    return Roofline(
        flops,
        traffic,
        compute_seconds=flops / peak.flops_per_second,
        memory_seconds=traffic.total / peak.bytes_per_second,
    )


def _median_seconds(function: Callable[[Any], Any], argument: Any, repeats: int) -> float:
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(argument))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
