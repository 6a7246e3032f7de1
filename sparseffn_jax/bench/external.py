"""Other libraries' products, timed only: what a block-sparse or dense product costs elsewhere.

PyTorch is optional (``pip install 'sparseffn_jax[torch]'``); without it, or on the wrong device,
a peer says why it cannot run. Weights are ``(inputs, outputs)`` as everywhere here.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jaxtyping import Float

from sparseffn_jax.ops.plans.choice import platform_of

Run = Callable[[], Any]
Weight = Float[np.ndarray, "i o"]
Precision = Literal["float32", "bfloat16"]
# Makes a function of activations, in the library's own arrays, from a weight and its blocks' side.
Linear = Callable[[Any, int], Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class ExternalPeer:
    """One way that a library multiplies activations by a weight.

    Attributes:
      library: the library that runs it.
      linear: makes the product of a weight, in the library's own arrays.
      platforms: the platforms on which it runs.
      precisions: the dtypes in which it runs.
      pattern: which zeros it can skip. ``"free"`` means any blocks; ``"2:4"`` two of every four
        inputs, to which weights are pruned first; and ``None`` that it skips none.
    """

    library: Literal["jax", "torch"]
    linear: Linear
    platforms: tuple[str, ...] = ("cpu", "gpu")
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    pattern: Literal["free", "2:4"] | None = "free"

    def refusal(self, precision: Precision = "float32") -> str | None:
        """Says why this peer cannot run here, or ``None`` if it can."""
        platform = platform_of(None)
        if platform not in self.platforms:
            return f"it needs a {' or '.join(self.platforms)}, this is a {platform}"
        if precision not in self.precisions:
            return f"it runs in {' or '.join(self.precisions)}, not in {precision}"
        return torch_refusal() if self.library == "torch" else None

    def product(
        self,
        weight: Weight,
        x: Float[np.ndarray, "t i"],
        *,
        block: int = 32,
        precision: Precision = "float32",
    ) -> Run:
        """Returns a function that computes ``x @ weight`` and waits for it.

        Args:
          weight: (i, o) weight, whose zeros are what the peer may skip.
          x: (t, i) activations.
          block: side of the blocks that hold the zeros.
          precision: dtype that weight and activations are cast to.

        Raises:
          ValueError: if the peer cannot run here; the message gives the reason.
        """
        if (reason := self.refusal(precision)) is not None:
            raise ValueError(f"this peer cannot run: {reason}")
        backend = _BACKENDS[self.library]
        return backend(lambda array: self._made(array(weight), block), x, precision)

    def _made(self, weight: Any, block: int) -> Callable[[Any], Any]:
        if self.pattern == "2:4":
            weight = _two_of_four(weight)
        return self.linear(weight, block)


def torch_refusal() -> str | None:
    """Says why PyTorch cannot run where JAX does, or ``None`` if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed: pip install 'sparseffn_jax[torch]'"
    import torch

    if platform_of(None) == "gpu" and not torch.cuda.is_available():
        return "the installed PyTorch has no CUDA"
    return None


def _run_jax(build: Callable[..., Any], x: np.ndarray, precision: Precision) -> Run:
    run = jax.jit(build(lambda weight: jnp.asarray(weight, precision)))
    x_on_device = jnp.asarray(x, precision)
    return lambda: jax.block_until_ready(run(x_on_device))


def _run_torch(build: Callable[..., Any], x: np.ndarray, precision: Precision) -> Run:
    import torch

    on_gpu = torch.cuda.is_available()
    dtype, device = getattr(torch, precision), "cuda" if on_gpu else "cpu"

    def array(values: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device, dtype)

    run: Any = build(array)
    x_on_device = array(x)
    if on_gpu:
        run = torch.compile(run)

    def synchronized() -> Any:
        with torch.inference_mode():
            y = run(x_on_device)
        if on_gpu:
            torch.cuda.synchronize()
        return y

    return synchronized


def _jax_dense(weight: Any, block: int) -> Callable[[Any], Any]:
    return lambda x: x @ weight


def _jax_bcsr(weight: Any, block: int) -> Callable[[Any], Any]:
    # A sparse left operand is the only form that has a kernel.
    matrix = sparse.BCSR.fromdense(weight.T)
    return lambda x: (matrix @ x.T).T


def _torch_dense(weight: Any, block: int) -> Callable[[Any], Any]:
    return lambda x: x @ weight


def _torch_csr(weight: Any, block: int) -> Callable[[Any], Any]:
    matrix = weight.T.contiguous().to_sparse_csr()
    return lambda x: (matrix @ x.T).T


def _torch_bsr(weight: Any, block: int) -> Callable[[Any], Any]:
    import torch

    matrix = weight.T.contiguous().to_sparse_bsr((block, block))
    if matrix.is_cuda:
        # There linear() has a block-sparse Triton kernel; on CPU it makes the weight dense.
        return lambda x: torch.nn.functional.linear(x, matrix)
    return lambda x: (matrix @ x.T).T


def _torch_semi_structured(weight: Any, block: int) -> Callable[[Any], Any]:
    import torch

    matrix = torch.sparse.to_sparse_semi_structured(weight.T.contiguous())
    return lambda x: torch.nn.functional.linear(x, matrix)


def _two_of_four(weight: Any) -> Any:
    """Zeroes the two smaller of every four inputs of each output."""
    import torch

    groups = weight.T.reshape(weight.shape[1], -1, 4)
    kept = groups.abs().topk(2, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
    return (groups * mask).reshape(weight.shape[1], weight.shape[0]).T


_BACKENDS = {"jax": _run_jax, "torch": _run_torch}
EXTERNAL: Mapping[str, ExternalPeer] = MappingProxyType(
    {
        "jax dense": ExternalPeer("jax", _jax_dense, pattern=None),
        "jax BCSR": ExternalPeer("jax", _jax_bcsr, precisions=("float32",)),
        "torch dense": ExternalPeer("torch", _torch_dense, pattern=None),
        "torch CSR": ExternalPeer("torch", _torch_csr, ("cpu",), ("float32",)),
        "torch BSR": ExternalPeer("torch", _torch_bsr, ("cpu",), ("float32",)),
        "torch BSR, compiled": ExternalPeer("torch", _torch_bsr, ("gpu",), ("bfloat16",)),
        "torch 2:4, compiled": ExternalPeer(
            "torch", _torch_semi_structured, ("gpu",), ("bfloat16",), "2:4"
        ),
    }
)
