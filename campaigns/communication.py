"""Bytes that a training step moves between devices, counted in compiled programs and by formulas.

Collectives are taken to run as rings, the best that bandwidth allows (Patarasuk & Yuan 2009): of
``n`` devices each sends ``(n - 1) / n`` of the result of an all-gather, as much of the argument of
a reduce-scatter, and twice as much of the argument of an all-reduce.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    rf"= (?P<result>\(?[a-z0-9]+\[.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
# One group written out, the iota form (groups, devices), or axes of a mesh.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<one>[0-9,]+)\}|\[[0-9]+,(?P<iota>[0-9]+)\]<=|"
    r"mesh\[(?P<mesh>[^\]]*)\][^{]*\{(?P<axes>[^}]*)\})"
)
_MESH_AXIS = re.compile(r"'(\w+)'(?:=|:\([0-9]+\))([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
      kind: one of ``KINDS``.
      devices: number of devices in one group that it runs in.
      bytes: size of its result on one device.
    """

    kind: str
    devices: int
    bytes: int

    @property
    def sent(self) -> float:
        """The number of bytes that each device sends."""
        n = self.devices
        if self.kind == "reduce-scatter":
            # Its argument is n times its result.
            return (n - 1) * self.bytes
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * (n - 1) / n * self.bytes


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What decides a dense decoder's communication.

    Attributes:
      layers: number of blocks.
      d_model: number of channels of the residual stream.
      ffn: number of parameters of all FFNs together.
      rest: number of all other parameters.
    """

    layers: int
    d_model: int
    ffn: int
    rest: int

    @classmethod
    def of_gpt2(cls, layers: int, d_model: int, vocab_size: int, positions: int) -> "ModelSize":
        """Returns the size of a GPT-2 with tied embeddings, biases and norms included."""
        d = d_model
        ffn = layers * (8 * d * d + 5 * d)
        attention_and_norms = layers * (4 * d * d + 4 * d + 4 * d) + 2 * d
        return cls(layers, d, ffn, attention_and_norms + (vocab_size + positions) * d)

    @classmethod
    def of_llama(
        cls, layers: int, d_model: int, d_ff: int, vocab_size: int, heads: int, kv_heads: int
    ) -> "ModelSize":
        """Returns the size of a LLaMA: gated FFNs, grouped-query attention, an untied head."""
        d = d_model
        attention = 2 * d * d + 2 * d * (d * kv_heads // heads)
        rest = layers * (attention + 2 * d) + d + 2 * vocab_size * d
        return cls(layers, d, layers * 3 * d * d_ff, rest)


# Radford et al. 2019; Touvron et al. 2023 (2302.13971 and 2307.09288).
MODELS: Mapping[str, ModelSize] = {
    "GPT-2 XL": ModelSize.of_gpt2(48, 1600, 50257, 1024),
    "LLaMA 7B": ModelSize.of_llama(32, 4096, 11008, 32000, 32, 32),
    "LLaMA 2 70B": ModelSize.of_llama(80, 8192, 28672, 32000, 64, 8),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How devices share the work; the product of the three is the number of devices.

    Attributes:
      data: number of replicas.
      fsdp: number of devices that share one copy of the parameters.
      tensor: number of devices that share each layer's work.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


def collectives(hlo: str) -> list[Collective]:
    """Lists the collective operations of a compiled program.

    Args:
      hlo: the program's text, from ``compiled.as_text()``. What stands in a loop counts once.
    """
    found = []
    for line in hlo.splitlines():
        if (match := _INSTRUCTION.search(line)) is None:
            continue
        sizes = [
            math.prod(map(int, filter(None, shape.split(",")))) * _itemsize(dtype)
            for dtype, shape in _SHAPE.findall(match["result"])
        ]
        found.append(Collective(match["kind"], _devices(line), sum(sizes)))
    return found


def bytes_sent(hlo: str) -> dict[str, float]:
    """Sums the bytes that each device sends in a compiled program, by kind of collective.

    Tests hold the formulas below against it.

    Args:
      hlo: the program's text, from ``compiled.as_text()``. What stands in a loop counts once.
    """
    sent: dict[str, float] = {}
    for collective in collectives(hlo):
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.sent
    return sent


def data_parallel_bytes(parameters: float, devices: int, gradient_itemsize: int = 4) -> float:
    """Returns the bytes that each device sends to average gradients over replicas.

    Args:
      parameters: number of parameters on one device.
      devices: number of replicas.
      gradient_itemsize: bytes of one entry of a gradient.
    """
    return 2 * (devices - 1) / devices * parameters * gradient_itemsize


def fsdp_bytes(
    parameters: float, devices: int, weight_itemsize: int = 2, gradient_itemsize: int = 4
) -> float:
    """Returns the bytes that each device sends when devices share one copy of the parameters.

    Parameters are gathered for the forward pass and again for the backward pass, and gradients are
    reduced and scattered (ZeRO stage 3).

    Args:
      parameters: number of parameters in the copy.
      devices: number of devices that share it.
      weight_itemsize: bytes of one weight as it travels.
      gradient_itemsize: bytes of one entry of a gradient.
    """
    per_parameter = 2 * weight_itemsize + gradient_itemsize
    return (devices - 1) / devices * parameters * per_parameter


def tensor_parallel_bytes(
    layers: int, d_model: int, tokens: int, devices: int, itemsize: int = 2
) -> float:
    """Returns the bytes that each device sends when devices share each layer's work.

    Each layer takes four all-reduces of activations: attention and FFN end with one each in the
    forward pass, and their inputs' gradients with one each in the backward pass (Megatron-LM).

    Args:
      layers: number of blocks.
      d_model: number of channels of the residual stream.
      tokens: number of tokens in one replica's share of the batch.
      devices: number of devices that share the work.
      itemsize: bytes of one activation.
    """
    return 4 * layers * 2 * (devices - 1) / devices * tokens * d_model * itemsize


def step_bytes(
    size: ModelSize, plan: Plan, tokens: int, ffn_ratio: float = 1.0
) -> dict[str, float]:
    """Returns the bytes that each device sends in one step, by mesh axis.

    Weights and activations travel in 16 bits, gradients in 32.

    Args:
      size: size of the model.
      plan: how devices share the work.
      tokens: number of tokens in the share of the batch that ``plan.tensor`` devices work on.
      ffn_ratio: parameters of the model's FFNs over those of dense ones.
    """
    own = (size.ffn * ffn_ratio + size.rest) / plan.tensor
    return {
        "data": data_parallel_bytes(own / plan.fsdp, plan.data),
        "fsdp": fsdp_bytes(own, plan.fsdp),
        "tensor": tensor_parallel_bytes(size.layers, size.d_model, tokens, plan.tensor),
    }


def _devices(line: str) -> int:
    groups = _GROUPS.search(line)
    if groups is None:
        return 2  # A permutation has pairs in place of groups.
    if groups["one"]:
        return len(groups["one"].split(","))
    if groups["iota"]:
        return int(groups["iota"])
    sizes = dict(_MESH_AXIS.findall(groups["mesh"]))
    # A part of an axis says its own size.
    sizes |= dict(_MESH_AXIS.findall(groups["axes"]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", groups["axes"]))


def _itemsize(dtype: str) -> int:
    bits = re.search(r"[0-9]+", dtype)
    return 1 if bits is None else max(1, int(np.ceil(int(bits[0]) / 8)))
