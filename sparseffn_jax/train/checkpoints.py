"""Orbax checkpoints of a run: its parameters, optimizer, data and guard as they were at a step.

A checkpoint has the items ``ffn`` (the feed-forward parameters, so that they can be restored
alone), ``rest`` (all other parameters), ``optimizer`` and ``position`` (JSON). Of ``ffn`` and
``rest`` one is left out if it would be empty. If the run was stopped between two of the guard's
snapshots, the item ``last_good`` holds the state that the guard would go back to. A checkpoint's
arrays do not depend on how many devices and processes wrote them, and are restored to any number of
devices.
"""

import contextlib
import dataclasses
import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, Self

import jax
import optax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from sparseffn_jax.train import processes
from sparseffn_jax.train.guard import GuardState
from sparseffn_jax.train.manifests import find_damage, is_sealed, seal
from sparseffn_jax.train.recipes import combine, split_ffn
from sparseffn_jax.train.step import TrainState

Params = dict[str, Any]
_FOLDER = "checkpoints"
_NONE = -1
# How often the remains of a checkpoint are removed before they are left to the next run.
_REMOVALS = 20
# A full or forbidden disk reaches us as what the operating system says, or wrapped: tensorstore
# raises ValueError, and JAX, when a process waits for another that failed, RuntimeError.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands, apart from its arrays.

    Attributes:
      step: the number of batches read.
      stage: the number of the recipe's stage, from 0.
      updates: the number of optimizer updates of this stage that are in the parameters, by which
        the learning rates are scheduled. A restore and an overflow make it fall behind ``step``.
      data: the batch iterator's state, ready for JSON.
      data_hash: the SHA-256 chained over the batches read, in hexadecimal.
      guard: the divergence guard's state.
    """

    step: int
    stage: int
    updates: int
    data: dict[str, Any]
    data_hash: str
    guard: GuardState

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuilds a position from ``dataclasses.asdict``'s output."""
        return cls(**{**values, "guard": GuardState.from_dict(values["guard"])})


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run at one position, with a copy of its train state in host memory."""

    position: Position
    state: TrainState


class CheckpointStore:
    """The checkpoints below a run's folder; leaving its context waits until all are written.

    A checkpoint is written while the run goes on: Orbax writes its files and gives the folder its
    name, then the folder is sealed (see :mod:`sparseffn_jax.train.manifests`) and read back, and
    only then are older checkpoints removed. When the disk is full or refuses, the earlier
    checkpoints stay as they were, and :meth:`take_warnings` tells of it.

    Args:
      out_dir: the run's folder; created if it is not there.
      keep: the number of whole checkpoints that stay, the newest ones.
    """

    def __init__(self, out_dir: str | Path, keep: int):
        self.path, self._keep = Path(out_dir).absolute() / _FOLDER, keep
        self.path.mkdir(parents=True, exist_ok=True)
        self._checkpointer = _make_checkpointer()
        self._thread = futures.ThreadPoolExecutor(1, "checkpoints")
        self._finishing: futures.Future[None] | None = None
        self._warnings: deque[str] = deque()
        self._damaged: set[int] = set()
        # A process that was killed leaves what it was writing.
        self._remove_unfinished()
        processes.wait_for_all("checkpoints")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_):
        self.wait()
        self._thread.shutdown()
        self._checkpointer.close()

    def latest_step(self) -> int | None:
        """Returns the newest whole checkpoint's step, or ``None``; reads every byte of it.

        Newer checkpoints that are damaged are passed over with a warning.
        """
        step, damage = _NONE, {}
        if processes.is_first():
            step, damage = _find_whole(self.path)
        self._damaged.update(damage)
        step = processes.from_first(step)
        going_on = "from the beginning" if step == _NONE else f"with that of step {step}"
        for number, reason in damage.items():
            self._warnings.append(
                f"the checkpoint {self.path / str(number)} is not whole ({reason}): going on "
                f"{going_on}"
            )
        return None if step == _NONE else step

    def sealed_step(self) -> int | None:
        """Returns the step of the newest checkpoint that was written to its end, or ``None``.

        Those that were found damaged do not count.
        """
        return max(self._sealed_steps(), default=None)

    def save(
        self,
        snapshot: Snapshot,
        frozen: Params,
        config: dict[str, Any],
        last_good: Snapshot | None = None,
    ) -> None:
        """Starts writing a checkpoint, after the one before is written.

        Args:
          snapshot: what to write, under its position's step.
          frozen: the parameters that do not train, which the snapshot's state lacks.
          config: the run's settings, ready for JSON; a resumed run must have the same.
          last_good: the guard's snapshot, unless it is ``snapshot`` itself.
        """
        self.wait()
        step = snapshot.position.step
        ffn, rest = split_ffn(combine(snapshot.state.trainable, frozen))
        parts = {"ffn": ffn, "rest": rest}
        items = {
            # Orbax refuses empty trees.
            **{name: ocp.args.StandardSave(x) for name, x in parts.items() if x},
            "optimizer": ocp.args.StandardSave(snapshot.state.optimizer),
            "position": ocp.args.JsonSave(
                {
                    "position": dataclasses.asdict(snapshot.position),
                    "last_good": last_good and dataclasses.asdict(last_good.position),
                    "config": config,
                }
            ),
        }
        if last_good is not None:
            items["last_good"] = ocp.args.StandardSave(last_good.state._asdict())
        try:
            # What is there under that name, if anything, was found damaged.
            self._checkpointer.save(
                self.path / str(step), args=ocp.args.Composite(**items), force=True
            )
        except _WRITE_ERRORS as error:
            self._warn(step, error)
        else:
            self._finishing = self._thread.submit(self._finish, step)

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None

    def take_warnings(self) -> list[str]:
        """Returns what has gone wrong since the last call, as sentences for the user."""
        return [self._warnings.popleft() for _ in range(len(self._warnings))]

    def read(self, step: int) -> tuple[Position, Position | None, dict[str, Any]]:
        """Returns a checkpoint's position, that of its ``last_good`` if any, and the settings."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        saved = self._checkpointer.restore(self.path / str(step), args=args)["position"]
        last_good = saved["last_good"] and Position.from_dict(saved["last_good"])
        return Position.from_dict(saved["position"]), last_good, saved["config"]

    def restore_params(self, step: int, like: Params, abstract: Callable[[Any], Any]) -> Params:
        """Returns all parameters of a checkpoint, in the precision saved.

        Args:
          step: the checkpoint's step.
          like: a tree with the names and shapes that the parameters must have.
          abstract: turns a tree of shapes into the one to restore to: its leaves with a sharding
            become arrays on their devices, all others NumPy arrays.

        Raises:
          ValueError: if the checkpoint's names or shapes are not those of ``like``.
        """
        folders = [self.path / str(step) / name for name in ("ffn", "rest")]
        saved = [_shapes_of(folder) for folder in folders]
        _check_same_shapes(combine(*saved), like, self.path / str(step))
        parts = zip(folders, saved, strict=True)
        return combine(*(_restore(folder, abstract(shapes)) for folder, shapes in parts))

    def restore_optimizer(self, step: int, like: optax.OptState) -> optax.OptState:
        """Returns the optimizer's state; ``like`` gives its structure, shapes and shardings."""
        return _restore(self.path / str(step) / "optimizer", like)

    def restore_last_good(self, step: int, like: TrainState) -> TrainState:
        """Returns the train state of the ``last_good`` snapshot, in the structure of ``like``."""
        return TrainState(**_restore(self.path / str(step) / "last_good", like._asdict()))

    def _finish(self, step: int) -> None:
        folder = self.path / str(step)
        try:
            self._checkpointer.wait_until_finished()
            if processes.is_first():
                seal(folder, _label(step))
                self._damaged.discard(step)
                if damage := find_damage(folder, _label(step)):
                    self._damaged.add(step)
                    raise OSError(f"what was read back is not what was written: {damage}")
                self._prune()
        except _WRITE_ERRORS as error:
            self._warn(step, error)

    def _prune(self) -> None:
        """Removes all checkpoints that are older than the newest whole ones, which are kept."""
        oldest = sorted(self._sealed_steps())[-self._keep :][0]
        for step in _steps(self.path):
            if step < oldest:
                shutil.rmtree(self.path / str(step))

    def _sealed_steps(self) -> list[int]:
        steps = _steps(self.path)
        return [s for s in steps if s not in self._damaged and is_sealed(self.path / str(s))]

    def _warn(self, step: int, error: Exception) -> None:
        kept = self.sealed_step()
        newest = "there is none yet" if kept is None else f"the newest is {self.path / str(kept)}"
        self._warnings.append(
            f"the checkpoint of step {step} could not be written ({_first_line(error)}); the run "
            f"goes on, {newest}"
        )
        self._remove_unfinished()
        # The old one would raise what is left of this error at its next save.
        self._checkpointer = _make_checkpointer()

    def _remove_unfinished(self) -> None:
        # It also gives back the room that a full disk needs.
        if not processes.is_first():
            return
        # Writers of the checkpoint that failed may still be at work, and put back what is removed.
        for _ in range(_REMOVALS):
            folders = list(self.path.glob("*.orbax-checkpoint-tmp*"))
            if not folders:
                return
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)


def restore_ffn(out_dir: str | Path, step: int | None = None) -> Params:
    """Returns the feed-forward parameters of a run's checkpoint, and reads no others.

    The library itself does not call it: it is for users who take a run's feed-forward layers into
    another model, and the reason why checkpoints keep them apart.

    Args:
      out_dir: the run's folder.
      step: the step of the checkpoint; ``None`` takes the newest checkpoint that is whole.

    Returns:
      The ``mlp`` subtrees at their places in the parameter tree, as NumPy arrays.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if it is damaged.
    """
    path = Path(out_dir).absolute() / _FOLDER
    steps = _steps(path)
    found = _find_whole(path)[0] if step is None else step
    if found not in steps:
        wanted = "whole checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(
            f"{path} holds no {wanted}: it has {', '.join(map(str, sorted(steps))) or 'none'}"
        )
    if step is not None and (damage := find_damage(path / str(step), _label(step))):
        raise ValueError(f"the checkpoint {path / str(step)} is not whole: {damage}")
    folder = path / str(found) / "ffn"
    return _restore(folder, _shapes_of(folder))


def _make_checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _restore(folder: Path, like: Any) -> Any:
    """Restores one item: leaves with a sharding to their devices, all others as NumPy arrays."""
    if not like:
        return {}
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, like)


def _shapes_of(folder: Path) -> Any:
    """Returns the shapes of an item's leaves; nothing if it was empty and not saved."""
    if not folder.is_dir():
        return {}
    # A checkpointer would warn that an item has no metadata of a checkpoint of its own.
    handler: Any = ocp.StandardCheckpointHandler()
    with contextlib.closing(handler):
        metadata = handler.metadata(folder)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree)


def _steps(path: Path) -> list[int]:
    return [int(p.name) for p in path.glob("*") if p.name.isdecimal() and p.is_dir()]


def _find_whole(path: Path) -> tuple[int, dict[int, str]]:
    """Returns the newest whole checkpoint's step, and what is wrong with newer ones."""
    damage = {}
    for step in sorted(_steps(path), reverse=True):
        problem = find_damage(path / str(step), _label(step))
        if problem is None:
            return step, damage
        damage[step] = problem
    return _NONE, damage


def _label(step: int) -> str:
    return f"the checkpoint of step {step}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _check_same_shapes(params: Params, like: Params, path: Path) -> None:
    saved, expected = _shapes(params), _shapes(like)
    wrong = [
        f"{name}: saved {saved.get(name, 'nothing')}, the model has {expected.get(name, 'nothing')}"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint {path} is of another model; {len(wrong)} parameters differ:\n  "
            + "\n  ".join(wrong[:5])
        )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    return {"/".join(path): leaf.shape for path, leaf in flat.items()}
