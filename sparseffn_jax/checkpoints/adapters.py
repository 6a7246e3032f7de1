"""Reads and writes LoRA adapters apart from their model, in the format of the library peft.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``
(https://huggingface.co/docs/peft/developer_guides/checkpoint). An adapted linear map has two
tensors, ``lora_A.weight`` (rank, inputs) and ``lora_B.weight`` (outputs, rank), whatever the layout
of the map itself. What trained in full beside the adapters is peft's ``modules_to_save``.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sparseffn_jax.checkpoints.errors import CheckpointError, some
from sparseffn_jax.checkpoints.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    PathLike,
    check_replaceable,
    find_adapter,
    replacing,
)
from sparseffn_jax.checkpoints.layout import split_rows, to_pytorch
from sparseffn_jax.checkpoints.matching import Match, check_leaf, expected_leaves
from sparseffn_jax.checkpoints.untrusted import read_json
from sparseffn_jax.checkpoints.weights import Tensor, Weights, in_memory, open_file
from sparseffn_jax.models.decoder import Decoder
from sparseffn_jax.models.names import fill, generalise
from sparseffn_jax.models.paths import ffn_of, is_ffn, is_module, is_out_in
from sparseffn_jax.nn.lora import LoraAdapter

_PREFIX = "base_model.model."
# A factor's name in peft, behind the name of the map.
_FACTOR = re.compile(r"(.*)\.lora_([AB])\.weight")
# Settings that say how adapters were trained, or what their tensors say too.
_IGNORED = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
        "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
        "target_modules", "task_type",
    )
)  # fmt: skip
_READ = frozenset(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"))
# The values of some settings that leave the model what it is.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (PiSSA, OLoRA, CorDA, LoftQ) change the weights that adapters are added to.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# A module's name, all of it behind a ^.
_PATTERN = re.compile(r"\^?[\w.-]+")
_MOST = 10**9


def save_adapter(
    folder: PathLike,
    model: Decoder,
    adapter: LoraAdapter,
    *,
    base_model: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters as a folder that peft and :func:`load_adapter` read.

    ``peft.PeftModel.from_pretrained(base, folder)`` puts them on the model that they were trained
    on, which transformers has loaded from a dense folder, or from a sparse one with
    ``trust_remote_code=True``. FFNs that trained in full are stored too, as ``modules_to_save``.

    Args:
      folder: the folder to write, whose parents are made.
      model: the model that the adapters belong to.
      adapter: the adapters, such as :attr:`TrainResult.adapter`.
      base_model: the folder or hub name of that model, which peft's ``Auto`` classes load.
      card: the text of ``README.md``; ``None`` writes none.
      overwrite: whether an adapter folder of that name is replaced, with all that is in it.

    Raises:
      CheckpointError: if the folder cannot be written or holds something already, or if the
        adapters are not the model's.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import sparseffn_jax as sf
      >>> model = sf.load_pretrained(sf.EMBEDDED_MODEL).model()
      >>> path = ("transformer", "h", "0", "attn", "c_proj", "kernel")
      >>> factors = {"a": jnp.ones((256, 2)), "b": jnp.ones((2, 256))}
      >>> for name in reversed(path):
      ...     factors = {name: factors}
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> sf.save_adapter(folder, model, sf.LoraAdapter(factors, {path: 0.5}))
      >>> sf.load_adapter(folder, model).scales[path]
      0.5
    """
    target = Path(folder).expanduser().resolve()
    stored = _Stored.of(model, adapter)
    config = json.dumps(stored.settings(base_model), indent=2) + "\n"
    try:
        check_replaceable(target, overwrite, holds=ADAPTER_CONFIG)
        with replacing(target) as staging:
            (staging / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
            save_file(stored.tensors, staging / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            if card is not None:
                (staging / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def load_adapter(source: PathLike, model: Decoder) -> LoraAdapter:
    """Reads LoRA adapters that peft or :func:`save_adapter` has written.

    Every name and shape is checked against the model before a tensor is read; no value may be NaN
    or infinite. ``adapter.merge(params)`` then gives the adapted model's parameters.

    Args:
      source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the name
        of such an adapter on the Hugging Face Hub.
      model: the model that the adapters are for.

    Returns:
      The adapters, in float32, and what trained in full beside them.

    Raises:
      CheckpointError: if the source is not there, damaged or of another model; if it is no LoRA, or
        has settings that are not supported, such as DoRA; the message names them.

    Example:
      >>> import sparseffn_jax as sf
      >>> model = sf.load_pretrained(sf.EMBEDDED_MODEL).model()
      >>> try:
      ...     sf.load_adapter(sf.EMBEDDED_MODEL, model)
      ... except sf.CheckpointError as error:
      ...     print(str(error).partition("has ")[2])
      no adapter_config.json: give an adapter folder as peft's
    """
    folder = find_adapter(source)
    settings = _Settings.read(folder / ADAPTER_CONFIG)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(
            f"{folder} must hold its weights as {ADAPTER_WEIGHTS}. Pickle files "
            "(adapter_model.bin) could run any code and are never opened: write it again with "
            "peft's save_pretrained(folder, safe_serialization=True)"
        )
    pairs, whole = _sort(_split(open_file(file), model), model, str(file))
    scales = {path: settings.scale(*pair.check(settings)) for path, pair in pairs.items()}
    factors, replaced = {}, {}
    for path, pair in pairs.items():
        factors[(*path, "a")], factors[(*path, "b")] = map(jnp.asarray, pair.read(path))
    for path, (tensor, transposed) in whole.items():
        array = np.asarray(tensor.read(), np.float32)
        replaced[path] = jnp.asarray(array.T if transposed else array)
    return LoraAdapter(unflatten_dict(factors), scales, unflatten_dict(replaced))


def adapted(weights: Weights, matched: Match, adapter: LoraAdapter, param_dtype: Any) -> Weights:
    """Returns a checkpoint's tensors with adapters merged, in float32, as each is read.

    Args:
      weights: the tensors.
      matched: where they belong in the tree of the model that ``adapter`` is for.
      adapter: the adapters.
      param_dtype: what the tensors are cast to afterwards; ``None`` keeps their dtypes.
    """
    factors: dict[Any, Any] = flatten_dict(adapter.factors, sep=".")
    replaced: dict[Any, Any] = flatten_dict(adapter.replaced, sep=".")
    scales = {".".join(path): scale for path, scale in adapter.scales.items()}

    def merged(tensor: Tensor, path: str, transposed: bool) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if path in replaced:
                array = np.asarray(replaced[path])
                whole = array.T if transposed else array
            else:
                a, b = (np.asarray(factors[f"{path}.{name}"]) for name in "ab")
                update = scales[path] * (a @ b)
                whole = np.asarray(tensor.read(), np.float32) + (update.T if transposed else update)
            return whole if param_dtype is not None else whole.astype(tensor.dtype)

        return read

    tensors = dict(weights.tensors)
    for name, tensor in weights.tensors.items():
        path, transposed = matched.places[name]
        if path in scales or path in replaced:
            read = merged(tensor, path, transposed)
            tensors[name] = dataclasses.replace(tensor, read=read)
    return dataclasses.replace(weights, tensors=tensors)


class _Pair(NamedTuple):
    """The two factors of one linear map, as peft stores them.

    Attributes:
      where: what names their holder in an error.
      module: the name of the map in PyTorch.
      shape: the shape of its weight, (outputs, inputs).
      tensors: the factors by their letter, A and B.
    """

    where: str
    module: str
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    def check(self, settings: "_Settings") -> tuple[str, int]:
        """Checks the factors' shapes and dtypes; returns the map's name and the rank."""
        rank, (outputs, inputs) = settings.rank(self.module), self.shape
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"{self.module}.lora_{letter}"
            if letter not in self.tensors:
                raise CheckpointError(f"{self.where} lacks {name}: it is incomplete")
            check_leaf(name, self.tensors[letter], shape)
        return self.module, rank

    def read(self, path: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the factors ``a`` and ``b`` of the kernel at ``path``."""
        a, b = (np.asarray(self.tensors[letter].read(), np.float32) for letter in "AB")
        return (b, a) if is_out_in(path) else (a.T, b.T)


def _split(tensors: Mapping[str, Tensor], model: Decoder) -> dict[str, Tensor]:
    """Returns tensors of which those for maps that PyTorch fuses are for each map by itself.

    Fused maps share the factor of their inputs, and each has some rows of the other.
    """
    fusions = {fusion.name: fusion for fusion in model.names.fusions}
    apart = {}
    for name, tensor in tensors.items():
        factor = _FACTOR.fullmatch(name)
        whole = f"{factor[1]}.weight" if factor else name
        pattern, numbers = generalise(whole.removeprefix(_PREFIX))
        if (fusion := fusions.get(pattern)) is None:
            apart[name] = tensor
            continue
        rows = fusion.rows(model.config)
        is_shared = factor is not None and factor[2] == "A"
        parts = [tensor] * len(rows) if is_shared else split_rows(name, tensor, rows)
        for part, own in zip(fusion.parts, parts, strict=True):
            own_name = fill(part, numbers)
            if factor:
                own_name = f"{own_name.removesuffix('.weight')}.lora_{factor[2]}.weight"
            apart[_PREFIX + own_name] = own
    return apart


def _sort(
    tensors: Mapping[str, Tensor], model: Decoder, where: str
) -> tuple[dict[tuple[str, ...], _Pair], dict[tuple[str, ...], tuple[Tensor, bool]]]:
    """Returns the pairs of factors, and what replaces a whole leaf and if transposed, by path."""
    leaves = expected_leaves(model, "the model's config")
    pairs: dict[tuple[str, ...], _Pair] = {}
    whole: dict[tuple[str, ...], tuple[Tensor, bool]] = {}
    unknown = []
    for name, tensor in tensors.items():
        own = name.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(own)
        dotted, transposed = model.names.to_path(f"{factor[1]}.weight" if factor else own)
        path, shape = tuple(dotted.split(".")), leaves.get(dotted)
        is_linear = transposed and path[-1] == "kernel"
        if own == name or shape is None or (factor and not is_linear):
            unknown.append(name)
        elif factor is None:
            check_leaf(name, tensor, shape[::-1] if transposed else shape)
            whole[path] = tensor, transposed
        else:
            outputs, inputs = shape if is_out_in(path) else shape[::-1]
            module = _module(model, path)
            pair = pairs.setdefault(path, _Pair(where, module, (outputs, inputs), {}))
            pair.tensors[factor[2]] = tensor
    if unknown:
        raise CheckpointError(
            f"{where} holds {len(unknown)} tensors that the model has no place for: "
            f"{some(unknown)}. It is for another model, or more than LoRA on linear maps"
        )
    if twice := pairs.keys() & whole.keys():
        raise CheckpointError(
            f"{where} holds both adapters for and a whole weight in place of "
            f"{some(['.'.join(path) for path in twice])}: one of them is too much"
        )
    if not pairs and not whole:
        raise CheckpointError(f"{where} holds no adapter")
    return pairs, whole


class _Settings(NamedTuple):
    """What ``adapter_config.json`` says of ranks and scales.

    Attributes:
      ranks: the ranks of modules by their names, and by ``""`` that of all others.
      alphas: the same of alpha.
      use_rslora: whether alpha is divided by the square root of the rank.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    use_rslora: bool

    @classmethod
    def read(cls, file: Path) -> "_Settings":
        values = read_json(file)
        _check_settings(values, file)
        ranks = _patterns(values, "rank_pattern", "r", int, file)
        alphas = _patterns(values, "alpha_pattern", "lora_alpha", int | float, file)
        return cls(ranks, alphas, values.get("use_rslora") is True)

    def rank(self, module: str) -> int:
        """Returns the rank of a module's adapter."""
        return _of_module(self.ranks, module)

    def scale(self, module: str, rank: int) -> float:
        """Returns what the product of a module's factors is multiplied with."""
        return _of_module(self.alphas, module) / (rank**0.5 if self.use_rslora else rank)


def _check_settings(values: Mapping[str, Any], file: Path) -> None:
    if "peft_type" not in values:
        raise CheckpointError(f"{file} has no peft_type: give an adapter folder as peft's")
    for name, value in values.items():
        # What a later version of peft adds is off where it says nothing.
        expected = _HARMLESS.get(name, (None, False, "", [], {}))
        if name not in _READ | _IGNORED and value not in expected:
            raise CheckpointError(
                f"{file} has {name[:80]}={str(value)[:80]!r}, which is not supported: expected "
                f"{expected[0]!r}, as adapters here are plain LoRA"
            )


def _patterns(
    values: Mapping[str, Any], key: str, default: str, kind: Any, file: Path
) -> dict[str, Any]:
    """Returns a setting of modules by their names, and by ``""`` what it is for all others."""
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file} has {key}={str(patterns)[:80]!r}: expected a JSON object")
    # peft takes regular expressions. One from elsewhere could run for ever: names alone are read.
    names = {name.replace("\\.", ".").removesuffix("$"): name for name in patterns}
    if wrong := [name for plain, name in names.items() if not _PATTERN.fullmatch(plain)]:
        raise CheckpointError(
            f"{file} has {key} for {wrong[0][:80]!r}: expected a module's name, such as q_proj; "
            "regular expressions are not read"
        )
    found = {plain: patterns[name] for plain, name in names.items()}
    found[""] = values.get(default, 8)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < _MOST:
            raise CheckpointError(
                f"{file} has {name[:80] or default}={str(value)[:80]!r}: expected a positive number"
            )
    return found


def _of_module(patterns: Mapping[str, Any], module: str) -> Any:
    """Returns the value of the first name that is a module's, as peft does."""
    for name, value in patterns.items():
        if module == name[1:] if name.startswith("^") else is_module(module, name):
            return value
    return patterns[""]


class _Stored(NamedTuple):
    """Adapters as peft stores them.

    Attributes:
      tensors: the tensors by name.
      ranks: the rank of each adapted module, by its name in PyTorch.
      alphas: the alpha of each.
      fan_in_fan_out: whether a weight in PyTorch is (inputs, outputs).
      replaced: the names of the modules that are stored as a whole.
      modules: the names of all modules that have parameters, and of those that they are in.
    """

    tensors: dict[str, np.ndarray]
    ranks: dict[str, int]
    alphas: dict[str, float]
    fan_in_fan_out: bool
    replaced: set[str]
    modules: set[str]

    @classmethod
    def of(cls, model: Decoder, adapter: LoraAdapter) -> "_Stored":
        """Checks that adapters are a model's, and names them as PyTorch does."""
        leaves = expected_leaves(model, "the model's config")
        factors: dict[Any, Any] = flatten_dict(adapter.factors)
        replaced: dict[Any, Any] = flatten_dict(adapter.replaced)
        own = {path[:-1] for path in factors} | replaced.keys()
        if strange := [name for name in map(".".join, own) if name not in leaves]:
            raise CheckpointError(
                f"the adapters are of another model than this one, which has no {some(strange)}"
            )
        if not factors:
            raise CheckpointError("there are no adapters to write: factors is empty")
        tensors, ranks, alphas = {}, {}, {}
        maps: dict[str, dict[str, tuple[np.ndarray, np.ndarray, float]]] = {}
        for path in dict.fromkeys(path[:-1] for path in factors):
            a, b = (np.asarray(factors[(*path, letter)], np.float32) for letter in "ab")
            a, b = (b, a) if is_out_in(path) else (a.T, b.T)
            name, _ = model.names.to_name(".".join(path))
            maps.setdefault(_module(model, path), {})[name] = a, b, adapter.scales[path]
        for module, parts in maps.items():
            a, b, scale = _joined(model, module, parts)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
            ranks[module], alphas[module] = len(a), scale * len(a)
        for name, tensor in to_pytorch(in_memory(adapter.replaced), model.names).items():
            tensors[_PREFIX + name] = np.ascontiguousarray(tensor.read())
        # The dense model too: export_dense may write one that the adapters fit as well.
        dense = expected_leaves(model.clone(ffns=()), "the model's config")
        paths = [tuple(dotted.split(".")) for dotted in leaves | dense]
        return cls(
            tensors,
            ranks,
            alphas,
            any(map(is_out_in, adapter.scales)),
            {".".join(ffn_of(path) if is_ffn(path) else path[:-1]) for path in replaced},
            {_module(model, path) for path in paths}
            | {".".join(path[:end]) for path in paths for end in range(1, len(path))},
        )

    def settings(self, base_model: str | None) -> dict[str, Any]:
        """Returns what ``adapter_config.json`` holds."""
        rank, alpha = (_most_common(values.values()) for values in (self.ranks, self.alphas))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": _short_names(self.ranks, self.modules),
            "rank_pattern": self._others(self.ranks, rank),
            "alpha_pattern": self._others(self.alphas, alpha),
            "modules_to_save": _short_names(self.replaced, self.modules, 1) or None,
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }

    def _others(self, values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
        """Returns the values that are not the usual one, by as few names as possible."""
        patterns = {}
        for value in {value: None for value in values.values() if value != usual}:
            modules = [module for module in values if values[module] == value]
            patterns |= dict.fromkeys(_short_names(modules, values), value)
        return patterns


def _short_names(
    modules: Collection[str], among: Collection[str], most_parts: int = 2
) -> list[str]:
    """Returns names that peft takes for these modules and for no other.

    They have few parts, or all: peft takes ``0.mlp`` in ``modules_to_save`` for ``10.mlp`` too.
    """

    def name_of(module: str) -> str:
        parts = module.split(".")
        for count in range(1, most_parts + 1):
            name = ".".join(parts[-count:])
            if all(other in modules for other in among if is_module(other, name)):
                return name
        return module

    return sorted(set(map(name_of, modules)))


def _most_common(values: Iterable[Any]) -> Any:
    ((value, _),) = collections.Counter(values).most_common(1)
    return int(value) if value == int(value) else value


def _joined(
    model: Decoder, module: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray, float]]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the factors, as peft's, and the scale of a map, of those of what PyTorch fuses in it.

    Args:
      model: the model.
      module: the map's name in PyTorch.
      parts: the factors and scales of the maps in it, by their names; some may have none.
    """
    pattern, numbers = generalise(f"{module}.weight")
    fusion = next((each for each in model.names.fusions if each.name == pattern), None)
    if fusion is None:
        ((a, b, scale),) = parts.values()
        return a, b, scale
    a = np.concatenate([a for a, _, _ in parts.values()])
    scale = next(iter(parts.values()))[2]
    rows = fusion.rows(model.config)
    joined, rank = np.zeros((sum(rows), len(a)), np.float32), 0
    ends = dict(zip([fill(part, numbers) for part in fusion.parts], np.cumsum(rows), strict=True))
    for name, (_, b, own) in parts.items():
        outputs, width = b.shape
        joined[ends[name] - outputs : ends[name], rank : rank + width] = b * (own / scale)
        rank += width
    return a, joined, scale


def _module(model: Decoder, path: tuple[str, ...]) -> str:
    """Returns the name in PyTorch of the module that holds a leaf, perhaps fused with others."""
    name, _ = model.names.to_name(".".join(path))
    pattern, numbers = generalise(name)
    for fusion in model.names.fusions:
        if pattern in fusion.parts:
            name = fill(fusion.name, numbers)
    return name.removesuffix(".weight")
