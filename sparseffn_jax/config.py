"""What a SparseFFN is made of: frozen, self-validating, hashable, exact in JSON.

Every mask here is static: XLA compiles the masked program, and what is masked has no parameter.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from sparseffn_jax.ops.activations import get_activation
from sparseffn_jax.ops.masks import BlockMask
from sparseffn_jax.parsing import check_fields, parse_dataclass

Transform = Literal["low_rank", "block_circulant"]
_HIGHEST_DEGREE = 64  # Beyond it nothing is gained.
_BLOCK_SPARSE_PLANS = ("slice", "rows", "columns", "gather", "masked")


@dataclasses.dataclass(frozen=True)
class SpectralConfig:
    """The spectral branch: ``down(activation(up(x)))``, both maps in a transform domain.

    Gated, it is ``down(activation(gate(x)) * up(x))``.

    Attributes:
      transform: ``"low_rank"``, data-adapted axes of which ``rank`` are kept (the Karhunen-Loeve
        transform); or ``"block_circulant"``, Fourier's axes within blocks of channels, of whose
        ``block_size // 2 + 1`` frequencies a mask keeps some.
      width: number of hidden units in this branch; a multiple of ``block_size`` if block-circulant.
      rank: low rank only: number of components that the maps into the hidden units keep.
      down_rank: low rank only: number of components that the map out of them keeps; 0 takes
        ``rank``.
      block_size: block-circulant only: side b of one circulant block; divides ``d_model`` and
        ``width``.
      frequency_mask: block-circulant only: ``block_size // 2 + 1`` booleans, ``True`` keeps a
        frequency; ``None`` keeps all.
      implementation: plan to force (low rank: ``"two_gemms"``, ``"merged"``; block-circulant:
        ``"fft"``, ``"dft"``, ``"split"``, ``"dense"``); ``None`` lets the cost model choose.
    """

    transform: Transform = "low_rank"
    width: int = 0
    rank: int = 0
    down_rank: int = 0
    block_size: int = 0
    frequency_mask: tuple[bool, ...] | None = None
    implementation: str | None = None

    def __post_init__(self):
        check_fields(self)
        _check_positive("spectral width", self.width)
        others = {
            "low_rank": ("block_size", "frequency_mask"),
            "block_circulant": ("rank", "down_rank"),
        }
        for name in others[self.transform]:
            if getattr(self, name) not in (0, None):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning with transform="
                    f"{self.transform!r}: leave it out"
                )
        if self.transform == "low_rank":
            _check_positive("rank", self.rank)
            _check_positive("down_rank", self.down_rank or self.rank)
            plans = ("two_gemms", "merged")
        else:
            self._check_blocks()
            plans = ("fft", "dft", "split", "dense")
        _check_implementation(self.implementation, plans)

    def _check_blocks(self):
        _check_positive("block_size", self.block_size)
        if self.width % self.block_size:
            raise ValueError(
                f"spectral width={self.width} is not a multiple of block_size={self.block_size}"
            )
        if self.frequency_mask is None:
            return
        frequencies = self.block_size // 2 + 1
        if len(self.frequency_mask) != frequencies:
            raise ValueError(
                f"frequency_mask has {len(self.frequency_mask)} entries, but block_size="
                f"{self.block_size} has {frequencies} frequencies (block_size // 2 + 1)"
            )
        if not any(self.frequency_mask):
            raise ValueError("frequency_mask keeps no frequency: leave the spectral part out")

    @property
    def frequencies(self) -> tuple[int, ...]:
        """The kept rFFT frequencies of a block-circulant map, ascending."""
        count = self.block_size // 2 + 1
        return tuple(
            f for f in range(count) if self.frequency_mask is None or self.frequency_mask[f]
        )


@dataclasses.dataclass(frozen=True)
class PolynomialConfig:
    """The learned activation of the spectral branch, ``sum_k c_k T_k(u / radius)``.

    Attributes:
      degree: highest degree of the Chebyshev basis.
      degree_mask: ``degree + 1`` booleans, ``True`` keeps the term; ``None`` keeps all.
      radius: R > 0; outside ``[-R, R]`` the polynomial goes on as its tangent lines.
      groups: channel groups with coefficients of their own; divides the spectral width.
    """

    degree: int = 4
    degree_mask: tuple[bool, ...] | None = None
    radius: float = 4.0
    groups: int = 1

    def __post_init__(self):
        check_fields(self)
        _check_positive("polynomial degree", self.degree)
        if self.degree > _HIGHEST_DEGREE:
            raise ValueError(f"polynomial degree={self.degree}: expected at most {_HIGHEST_DEGREE}")
        _check_positive("polynomial groups", self.groups)
        if not 0.0 < self.radius < float("inf"):
            raise ValueError(f"polynomial radius={self.radius}: expected a positive number")
        if self.degree_mask is None:
            return
        if len(self.degree_mask) != self.degree + 1:
            raise ValueError(
                f"degree_mask has {len(self.degree_mask)} entries, but degree={self.degree} has "
                f"{self.degree + 1} terms (degree + 1)"
            )
        if not any(self.degree_mask):
            raise ValueError("degree_mask keeps no term: leave the polynomial part out")

    @property
    def degrees(self) -> tuple[int, ...]:
        """The kept degrees, ascending."""
        return tuple(
            k for k in range(self.degree + 1) if self.degree_mask is None or self.degree_mask[k]
        )


@dataclasses.dataclass(frozen=True)
class CoreConfig:
    """Micro-refinement of kind "ffn": ``W2 phi(W1 x + b1)`` on ``width`` hidden units.

    Gated, it is ``W2 (phi(Wg x + bg) * (Wu x + bu))``.

    Attributes:
      width: number of hidden units; all ``d_ff`` of them without masks is the dense FFN itself.
      up_mask: blocks kept of W1, or of both Wg and Wu, over ``(d_model, width)``; ``None`` keeps
        every block.
      down_mask: blocks kept of W2, over ``(width, d_model)``; ``None`` keeps every block.
      implementation: plan to force where there is a mask: ``"slice"``, ``"rows"``, ``"columns"``,
        ``"gather"`` or ``"masked"``, as :func:`block_sparse_matmul` describes them.
    """

    width: int
    up_mask: BlockMask | None = None
    down_mask: BlockMask | None = None
    implementation: str | None = None

    def __post_init__(self):
        check_fields(self)
        _check_positive("core width", self.width)
        _check_implementation(self.implementation, _BLOCK_SPARSE_PLANS)

    @property
    def runs_in_tiles(self) -> bool:
        """Whether an unstructured mask has it run as many small products, as a rule."""
        if self.implementation in ("masked", "gather"):
            return False
        core = self.without_dead_units()
        masks = (core.up_mask, core.down_mask)
        return any(mask is not None and not mask.is_structured for mask in masks)

    def without_dead_units(self) -> "CoreConfig":
        """Returns the core without the hidden units that no output reads.

        Masks of whole units leave a plain, narrower FFN, with no mask at all.
        """
        if self.down_mask is None:
            return self
        blocks_of = {
            "up_mask": None if self.up_mask is None else self.up_mask.block_shape[1],
            "down_mask": self.down_mask.block_shape[0],
        }
        group = math.lcm(*(side or 1 for side in blocks_of.values()))
        is_read = np.array(self.down_mask.blocks).any(axis=1)
        units = np.repeat(is_read, blocks_of["down_mask"]).reshape(-1, group).any(axis=1)
        masks: dict[str, BlockMask | None] = {}
        for name, side in blocks_of.items():
            if (mask := getattr(self, name)) is None:
                masks[name] = None
                continue
            kept = np.repeat(units, group // side)
            blocks = np.array(mask.blocks)
            blocks = blocks[:, kept] if name == "up_mask" else blocks[kept]
            if not blocks.any():
                return self
            masks[name] = None if blocks.all() else BlockMask.from_array(blocks, mask.block_shape)
        smaller = dataclasses.replace(self, width=int(units.sum()) * group, **masks)
        # Without the one mask, the other may allow a finer cut.
        return self if smaller == self else smaller.without_dead_units()


@dataclasses.dataclass(frozen=True)
class MicroRefinementConfig:
    """The micro-refinement: a core FFN beside the spectral branch, and corrections after both.

    Attributes:
      core: an FFN of few hidden units, or of few blocks, added to the spectral branch.
      corrections: masks over ``(d_model, d_model)``, one for each linear correction ``y + y B``
        of the layer's output.
      implementation: plan to force for the corrections; :class:`CoreConfig` lists the names.
    """

    core: CoreConfig | None = None
    corrections: tuple[BlockMask, ...] = ()
    implementation: str | None = None

    def __post_init__(self):
        check_fields(self)
        if self.core is None and not self.corrections:
            raise ValueError(
                "micro-refinement needs a core or at least one correction: or leave it out"
            )
        _check_implementation(self.implementation, _BLOCK_SPARSE_PLANS)


@dataclasses.dataclass(frozen=True)
class SparseFFNConfig:
    """A sparse feed-forward layer: what stands in for a dense ``d_model -> d_ff -> d_model`` one.

    Attributes:
      d_model: channels in and out.
      d_ff: hidden width of the dense FFN that it stands for.
      activation: phi, by its Hugging Face name; used by the core, and by the spectral branch
        when ``polynomial`` is ``None``.
      spectral: the spectral branch, or ``None``.
      polynomial: the spectral branch's activation, or ``None`` for phi itself.
      micro: the micro-refinement, or ``None``.
      gated: whether a hidden unit is ``phi(gate) * up``, two maps of the input, as in LLaMA.
      bias: whether the maps have biases; a model whose FFN has none converts without any.

    Raises:
      ValueError: on construction, if the parts do not fit together; the message names the value
        and what was expected.
    """

    d_model: int
    d_ff: int
    activation: str = "gelu_new"
    spectral: SpectralConfig | None = None
    polynomial: PolynomialConfig | None = None
    micro: MicroRefinementConfig | None = None
    gated: bool = False
    bias: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_positive("d_model", self.d_model)
        _check_positive("d_ff", self.d_ff)
        get_activation(self.activation)
        if self.spectral is None and (self.micro is None or self.micro.core is None):
            raise ValueError(
                "a SparseFFN needs a spectral branch or a micro-refinement core: with neither, "
                "its output is constant"
            )
        if self.polynomial is not None:
            if self.spectral is None:
                raise ValueError("polynomial is the spectral branch's activation: add spectral")
            if self.spectral.width % self.polynomial.groups:
                raise ValueError(
                    f"polynomial groups={self.polynomial.groups} do not divide the spectral "
                    f"width={self.spectral.width}"
                )
        if self.spectral is not None:
            self._check_spectral(self.spectral)
        if self.micro is not None:
            self._check_micro(self.micro)

    def _check_spectral(self, spectral: SpectralConfig):
        if spectral.transform == "block_circulant":
            if self.d_model % spectral.block_size:
                raise ValueError(
                    f"block_size={spectral.block_size} does not divide d_model={self.d_model}"
                )
            return
        for name in ("rank", "down_rank"):
            rank = getattr(spectral, name)
            limit = min(self.d_model, spectral.width)
            if rank > limit:
                raise ValueError(
                    f"{name}={rank} exceeds {limit}, the smaller of d_model={self.d_model} and "
                    f"the spectral width={spectral.width}"
                )

    def _check_micro(self, micro: MicroRefinementConfig):
        for i, mask in enumerate(micro.corrections):
            _check_mask_shape(f"corrections[{i}]", mask, (self.d_model, self.d_model))
        if micro.core is not None:
            width = micro.core.width
            _check_mask_shape("up_mask", micro.core.up_mask, (self.d_model, width))
            _check_mask_shape("down_mask", micro.core.down_mask, (width, self.d_model))

    @property
    def up_maps(self) -> tuple[str, ...]:
        """Names of the maps into a hidden unit: the gate, on which phi acts, comes first."""
        return ("gate", "up") if self.gated else ("up",)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict from which :meth:`from_dict` rebuilds an equal config."""
        return dataclasses.asdict(self, dict_factory=_json_dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from :meth:`to_dict`'s output.

        Raises:
          ValueError: for an unknown, missing or wrongly typed key, and for values that do not
            fit together.
        """
        return parse_dataclass(cls, values, "config")

    @classmethod
    def layers_from_json(cls, text: str) -> Self | tuple[Self | None, ...]:
        """Reads one config for every layer, or a list with one, or null for dense, for each.

        Raises:
          ValueError: as :meth:`from_json`.
        """
        values = _load_json(text)
        if not isinstance(values, list):
            return cls.from_dict(values)
        return tuple(
            None if layer is None else parse_dataclass(cls, layer, f"layer {i}")
            for i, layer in enumerate(values)
        )

    def to_json(self) -> str:
        """Returns the config as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Builds a config from :meth:`to_json`'s output; raises ``ValueError`` if it is not one."""
        return cls.from_dict(_load_json(text))


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is not JSON: {error}") from error


def _digits(row: tuple[bool, ...]) -> str:
    return "".join("01"[block] for block in row)


def _json_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        name: [_digits(row) for row in value] if name == "blocks" else value
        for name, value in items
    }


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")


def _check_implementation(implementation: str | None, plans: tuple[str, ...]) -> None:
    if implementation is not None and implementation not in plans:
        raise ValueError(
            f"implementation={implementation!r}: expected one of {', '.join(plans)}, or null"
        )


def _check_mask_shape(name: str, mask: BlockMask | None, shape: tuple[int, int]) -> None:
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"{name} covers {mask.shape} ({mask.grid[0]} x {mask.grid[1]} blocks of "
            f"{mask.block_shape[0]} x {mask.block_shape[1]}), but the weight is {shape}"
        )
