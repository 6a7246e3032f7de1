"""Programs for GPUs that are not there, compiled by XLA's own GPU compiler, and their time.

XLA compiles for a device from its description alone. What it compiles is what would run, apart from
the tile sizes of matrix products, which it tries out where there is a device. The time is an
estimate by a roofline for every kernel (Williams et al. 2009), not a measurement.
"""

import dataclasses
import functools
import importlib.util
import json
import operator
import types
import warnings
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from sparseffn_jax.measure.flops import count_kernels
from sparseffn_jax.measure.programs import TRITON, Kernel, Program, read_program
from sparseffn_jax.ops.plans.kernels import Target, compiling_for

_FILE = resources.files("sparseffn_jax") / "assets" / "gpus.json"
# What large matrix products and streams reach of the figures on the data sheet: chosen on the 58
# times of an H100 in campaigns/results.
_OF_FLOPS, _OF_BYTES = 0.7, 0.8
# What our own kernels reach of products and of other arithmetic, one after the other: low-rank
# layers on an H200 (campaigns/results), and block-circulant ones, whose tiles are small.
_BY_TRITON, _BY_CIRCULANT = (0.54, 0.36), (0.16, 0.11)
# Attention here stands for cuDNN's where the GPU is.
_OF_FLOPS_BY_ATTENTION = 0.5
# Of a kernel within a program, in seconds: the next one starts when the one before has ended.
_LAUNCH = 2e-6
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class GPU:
    """A GPU, as its data sheet describes it.

    Attributes:
      description: its name, as the driver says it.
      compute_capability: major and minor number.
      cores: number of streaming multiprocessors.
      fpus_per_core: number of float32 units in each of them.
      clock_ghz: clock rate, in 10^9 cycles a second.
      memory_bytes: size of its memory.
      memory_bytes_per_second: bandwidth of its memory.
      l2_bytes: size of its last cache.
      shared_bytes_per_core: size of the shared memory of a multiprocessor.
      shared_bytes_per_block: the most of it that one block of threads may have.
      matrix_flops_per_second: for a dtype, operations a second of dense matrix products; float32 as
        TF32.
      flops_per_second: operations a second of float32 arithmetic outside matrix products.
      link_bytes_per_second: bandwidth to other GPUs of its host, in one direction.
    """

    description: str
    compute_capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory_bytes: int
    memory_bytes_per_second: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    matrix_flops_per_second: Mapping[str, float]
    flops_per_second: float
    link_bytes_per_second: float

    def kernel_seconds(self, kernel: Kernel) -> float:
        """Estimates the time of one run of a kernel, in seconds.

        The arithmetic of a kernel, and its traffic, overlap fully; each reaches the share of the
        data sheet's figures that large kernels reach. In kernels of our own, products and other
        arithmetic do not overlap.

        Args:
          kernel: the kernel.
        """
        if kernel.is_collective:
            return _LAUNCH + kernel.bytes_sent / (_OF_BYTES * self.link_bytes_per_second)
        product = self.matrix_flops_per_second.get(kernel.dtype, self.flops_per_second)
        of_products, of_others, join = _OF_FLOPS, _OF_FLOPS, max
        if kernel.kind in TRITON and "mha" in kernel.scope:
            of_products = _OF_FLOPS_BY_ATTENTION
        elif kernel.kind in TRITON:
            is_circulant = "circulant" in kernel.scope
            of_products, of_others = _BY_CIRCULANT if is_circulant else _BY_TRITON
            join = operator.add
        arithmetic = join(
            kernel.matrix_flops / (of_products * product),
            kernel.other_flops / (of_others * self.flops_per_second),
        )
        return _LAUNCH + max(
            arithmetic,
            kernel.bytes_moved / (_OF_BYTES * self.memory_bytes_per_second),
        )

    def seconds(self, program: Program) -> float:
        """Estimates the time of a program, in seconds: that of its kernels, one after the other."""
        return sum(kernel.times * self.kernel_seconds(kernel) for kernel in program.kernels)

    def devices(self, hosts: int = 1, each: int = 1) -> np.ndarray:
        """Returns devices to compile for, of shape (hosts, each); none of them has to be there.

        Put a ``jax.sharding.Mesh`` over them, or one of them into a ``SingleDeviceSharding``.

        Args:
          hosts: number of hosts.
          each: number of GPUs of each host.

        Raises:
          ModuleNotFoundError: if JAX's plugin for CUDA, which has the compiler, is not installed.
          RuntimeError: if it is, but JAX could not start it.
        """
        if not any(importlib.util.find_spec(name) for name in _PLUGINS):
            raise ModuleNotFoundError(
                "compiling for a GPU that is not there needs JAX's plugin for CUDA: "
                "pip install 'sparseffn_jax[programs]'"
            )
        name = f"1x{hosts}x{each}"
        try:
            topology = topologies.get_topology_desc(
                name, "cuda", target_config=self._target(), topology=name
            )
        except NotImplementedError:
            raise RuntimeError(
                "JAX could not start its plugin for CUDA, which compiles for GPUs: where there is "
                "none, set JAX_PLATFORMS=cpu before Python starts"
            ) from None
        return np.array(topology.devices).reshape(hosts, each)

    def _target(self) -> str:
        """Returns XLA's description of the device, GpuTargetConfigProto, as text."""
        major, minor = self.compute_capability
        # Hopper and later have instructions that only their own compute capability has.
        feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_bytes_per_core}
              threads_per_core_limit: 2048
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {round(self.memory_bytes_per_second)}
              l2_cache_size: {self.l2_bytes}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes}
              shared_memory_per_block_optin: {self.shared_bytes_per_block}
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {feature}
              }}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            device_description_str: "{self.description}"
        """


@functools.cache
def gpus() -> Mapping[str, GPU]:
    """Returns the GPUs that are known, by their short names."""
    values = json.loads(_FILE.read_text(encoding="utf-8"))
    return types.MappingProxyType(
        {
            name: GPU(**fields | {"compute_capability": tuple(fields["compute_capability"])})
            for name, fields in values.items()
        }
    )


def gpu_here() -> GPU | None:
    """Returns what is known of the GPU that JAX runs on, or ``None``."""
    kind = jax.devices()[0].device_kind
    return next((gpu for gpu in gpus().values() if gpu.description == kind), None)


def compile_for(
    gpu: GPU, function: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> Program:
    """Compiles a function for a GPU that need not be there.

    Args:
      gpu: the GPU.
      function: any JAX function.
      *args: its arguments: trees of arrays, or of anything else with a shape and a dtype. Those
        with a sharding over devices of :meth:`GPU.devices` keep it; the others lie on one device.
      donate_argnums: numbers of the arguments whose memory results may be written to.

    Raises:
      ModuleNotFoundError, RuntimeError: as :meth:`GPU.devices`.
    """
    device = gpu.devices()[0, 0]
    here = jax.sharding.SingleDeviceSharding(device)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        given = getattr(leaf, "sharding", None)
        is_there = given is None or not given.device_set.isdisjoint(jax.devices())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here if is_there else given)

    shapes = jax.tree.map(placed, args)
    shared = max((len(leaf.sharding.device_set) for leaf in jax.tree.leaves(shapes)), default=1)
    capability = ".".join(map(str, gpu.compute_capability))
    parts: list[Any] = []
    with compiling_for(Target(capability, shared, parts)):
        # A function of its own: JAX would give back what it has traced of this one for another GPU.
        anew = jax.jit(lambda *args: function(*args), donate_argnums=donate_argnums)
        traced = anew.trace(*shapes)
    # From JAX 0.11 on kernels written by hand are lowered for the device that is the default one;
    # those that several devices share, while the program is compiled.
    with jax.default_device(device), warnings.catch_warnings():
        # What is in the cache can only be loaded where the device is; it is compiled again.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    kernels = count_kernels(traced.jaxpr)
    for part in parts:
        kernels |= count_kernels(part)
    return read_program(compiled, kernels)
