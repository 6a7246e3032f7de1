"""The layers of a conversion so far, kept in a folder, so that a stopped one goes on.

Each converted layer is one safetensors file, which appears under its name only when it is complete.
Beside them lie the streams behind the last one, from which the next goes on.
"""

import json
import os
import shutil
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparseffn_jax.checkpoints.errors import CheckpointError
from sparseffn_jax.checkpoints.untrusted import read_json
from sparseffn_jax.checkpoints.weights import open_file
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.records import make_folder, write_json

_SETTINGS, _STREAMS, _ERRORS = "settings.json", "streams-", "errors.json"


class PartialConversion:
    """A folder of converted layers."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Opens the folder of a stopped conversion, or begins a new one.

        Args:
          folder: the folder; it is made if it is not there.
          settings: all that decides the result but the dense weights; JSON values.

        Raises:
          CheckpointError: if the settings of the conversion in the folder are damaged.
          ValueError: if the folder holds a conversion with other settings, or something else.
        """
        self.folder = folder
        make_folder(folder)
        file = folder / _SETTINGS
        settings = json.loads(json.dumps(settings))
        if not file.is_file():
            if any(folder.iterdir()):
                raise ValueError(
                    f"{folder} holds files but no {_SETTINGS} of a stopped conversion: move them "
                    "away, or write to another folder"
                )
            write_json(file, settings)
            return
        try:
            stored = read_json(file)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}: delete {folder} to begin the conversion anew"
            ) from None
        names = sorted(stored.keys() | settings.keys())
        if differing := [name for name in names if stored.get(name) != settings.get(name)]:
            raise ValueError(
                f"{folder} holds a stopped conversion with other settings "
                f"({', '.join(differing)}): repeat its command to go on with it, or delete the "
                "folder to begin anew"
            )

    def load(self, layer: int, dense: Any) -> tuple[SparseFFNConfig, dict[str, Any]] | None:
        """Returns a converted layer's config and parameters, or ``None`` if it is not there.

        Args:
          layer: the layer's number.
          dense: parameters of the layer's dense FFN.

        Raises:
          ValueError: if the layer was converted from other weights.
        """
        file = self._file(layer)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="numpy") as handle:
                metadata = handle.metadata()
                leaves: dict[str, Any] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except SafetensorError:
            # What a power failure left; the layer is converted again.
            return None
        if metadata["dense"] != checksum(dense):
            raise ValueError(
                f"{self.folder} holds a stopped conversion of other weights (layer {layer} "
                "differs): delete the folder to begin anew"
            )
        config = SparseFFNConfig.from_dict(json.loads(metadata["config"]))
        return config, unflatten_dict(leaves, sep="/")

    def on_demand(self, layer: int) -> dict[str, Any]:
        """Returns the parameters of a layer that is kept here, each read when it is needed.

        Args:
          layer: the layer's number.
        """
        return unflatten_dict(open_file(self._file(layer)), sep="/")

    def save(self, layer: int, dense: Any, config: SparseFFNConfig, leaves: Any) -> None:
        """Keeps a converted layer.

        Args:
          layer: the layer's number.
          dense: parameters of the layer's dense FFN.
          config: config of the layer's SparseFFN.
          leaves: its parameters.
        """
        flat: dict[str, Any] = flatten_dict(leaves, sep="/")
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
        metadata = {"dense": checksum(dense), "config": json.dumps(config.to_dict())}
        file = self._file(layer)
        unfinished = file.with_suffix(".unfinished")
        save_file(arrays, unfinished, metadata=metadata)
        os.replace(unfinished, file)

    def save_streams(
        self, layer: int, streams: Sequence[np.ndarray], errors: Mapping[int, float]
    ) -> None:
        """Keeps the streams behind a layer, in the place of those behind an earlier one.

        Without room for them on the disk the earlier ones stay: a conversion that goes on then
        takes the text through more layers again.

        Args:
          layer: the layer's number.
          streams: arrays of any dtype.
          errors: error of each layer so far.
        """
        unfinished = self.folder / f"{_STREAMS}unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            for i, stream in enumerate(streams):
                # NumPy's files do not know bfloat16.
                np.save(unfinished / f"{i}.npy", stream.view(np.uint8), allow_pickle=False)
            write_json(unfinished / _ERRORS, {str(i): error for i, error in errors.items()})
            # What a stop leaves behind would stand in the way.
            shutil.rmtree(self._streams_of(layer), ignore_errors=True)
            unfinished.rename(self._streams_of(layer))
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        for other in self.folder.glob(f"{_STREAMS}*"):
            if other != self._streams_of(layer):
                shutil.rmtree(other, ignore_errors=True)

    def load_streams(
        self, layers: Collection[int], shape: tuple[int, ...], dtype: Any
    ) -> tuple[int, list[np.ndarray], dict[int, float]] | None:
        """Returns the last layer that has streams behind it, the streams, and errors by layer.

        Args:
          layers: numbers of the layers that the conversion replaces.
          shape: shape of each stream.
          dtype: dtype of each.

        Returns:
          ``None`` if there are none, they are damaged, or a layer before them is not there.
        """
        numbers = [
            int(number)
            for folder in self.folder.glob(f"{_STREAMS}*")
            if (number := folder.name.removeprefix(_STREAMS)).isdigit()
        ]
        for layer in sorted(numbers, reverse=True):
            before = {each for each in layers if each <= layer}
            if not all(map(self._is_whole, before)):
                continue
            try:
                files = sorted(self._streams_of(layer).glob("*.npy"))
                streams = [np.load(file, allow_pickle=False).view(dtype) for file in files]
                stored = read_json(self._streams_of(layer) / _ERRORS)
                errors = {int(each): float(error) for each, error in stored.items()}
            except (CheckpointError, OSError, ValueError):
                continue
            fits = len(streams) == 2 and all(stream.shape == shape for stream in streams)
            if fits and errors.keys() == before:
                return layer, streams, errors
        return None

    def _is_whole(self, layer: int) -> bool:
        try:
            with safe_open(self._file(layer), framework="numpy"):
                return True
        except (OSError, SafetensorError):
            return False

    def _streams_of(self, layer: int) -> Path:
        return self.folder / f"{_STREAMS}{layer:04d}"

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


def checksum(tree: Any) -> str:
    """Returns a checksum of all leaves of a tree, in the order in which JAX lists them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.asarray(leaf).tobytes(), total)
    return f"{total:08x}"
