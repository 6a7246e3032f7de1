"""Orbax checkpoints of a run: what its parameters, optimizer, data and guard were at a step.

A checkpoint has the items ``ffn`` (the feed-forward parameters, so that they can be restored
alone), ``rest`` (all other parameters), ``optimizer``, ``position`` (JSON) and, where a run was
stopped between two snapshots, ``last_good`` (what the guard would go back to).
"""

import dataclasses
from pathlib import Path
from typing import Any, Self

import optax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseffn_jax.train.guard import GuardState
from sparseffn_jax.train.recipes import combine
from sparseffn_jax.train.step import TrainState

Params = dict[str, Any]
_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands, apart from its arrays.

    Attributes:
      step: batches read.
      stage: of the recipe, from 0.
      updates: optimizer updates of this stage that the parameters have seen: fewer than batches
        after a restore. Rates are scheduled by them.
      data: the batch iterator's state.
      data_hash: SHA-256 chained over the batches read, in hexadecimal.
      guard: what the divergence guard remembers.
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
        return cls(**{**values, "guard": GuardState(**values["guard"])})


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run at one position; the state's arrays are in host memory."""

    position: Position
    state: TrainState


class CheckpointStore:
    """The checkpoints below a run's folder; a context that leaves when all are written.

    Args:
      out_dir: the run's folder; created if it is not there.
      keep: how many of the newest checkpoints stay.
    """

    def __init__(self, out_dir: str | Path, keep: int):
        self.path = Path(out_dir).absolute() / _FOLDER
        self.path.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.path, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or ``None``."""
        return self._manager.latest_step()

    def save(
        self,
        snapshot: Snapshot,
        frozen: Params,
        config: dict[str, Any],
        last_good: Snapshot | None = None,
    ) -> None:
        """Starts writing a checkpoint; it counts once it is complete.

        Args:
          snapshot: what to write, under its position's step.
          frozen: the parameters that the state lacks.
          config: the run's settings, JSON-ready; a resumed run must have the same.
          last_good: the guard's snapshot, where it is another one.
        """
        ffn, rest = _split_ffn(combine(snapshot.state.trainable, frozen))
        items = {
            "ffn": ocp.args.StandardSave(ffn),
            "rest": ocp.args.StandardSave(rest),
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
        self._manager.save(snapshot.position.step, args=ocp.args.Composite(**items), force=True)

    def read(self, step: int) -> tuple[Position, Position | None, dict[str, Any]]:
        """Returns a checkpoint's position, its ``last_good`` snapshot's if any, and the config."""
        saved = self._restore(step, "position", ocp.args.JsonRestore())
        last_good = saved["last_good"] and Position.from_dict(saved["last_good"])
        return Position.from_dict(saved["position"]), last_good, saved["config"]

    def restore_params(self, step: int, like: Params) -> Params:
        """Returns all parameters of a checkpoint as NumPy arrays, in the precision saved.

        Raises:
          ValueError: if they have not the names and shapes of ``like``.
        """
        parts = [self._restore(step, name, ocp.args.StandardRestore()) for name in ("ffn", "rest")]
        params = combine(*parts)
        _check_same_shapes(params, like, self.path / str(step))
        return params

    def restore_optimizer(self, step: int, like: optax.OptState) -> optax.OptState:
        """Returns the optimizer's state; ``like`` gives its structure and shapes."""
        return self._restore(step, "optimizer", ocp.args.StandardRestore(like))

    def restore_last_good(self, step: int, like: TrainState) -> TrainState:
        """Returns the state of the ``last_good`` snapshot; see :meth:`restore_optimizer`."""
        return TrainState(
            **self._restore(step, "last_good", ocp.args.StandardRestore(like._asdict()))
        )

    def _restore(self, step: int, name: str, args: ocp.args.CheckpointArgs) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]


def restore_ffn(out_dir: str | Path, step: int | None = None) -> Params:
    """Returns the feed-forward parameters of a run's checkpoint, and nothing else of it.

    Args:
      out_dir: the run's folder.
      step: of the checkpoint; ``None`` takes the newest.

    Returns:
      The ``mlp`` subtrees at their places in the parameter tree, as NumPy arrays.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
    """
    path = Path(out_dir).absolute() / _FOLDER
    steps = ocp.utils.checkpoint_steps(path) if path.is_dir() else []
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"{path} holds no checkpoint{'' if step is None else f' of step {step}'}: it has "
            f"{', '.join(map(str, sorted(steps))) or 'none'}"
        )
    with CheckpointStore(out_dir, keep=len(steps)) as store:
        return store._restore(step or max(steps), "ffn", ocp.args.StandardRestore())


def _split_ffn(params: Params) -> tuple[Params, Params]:
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flatten_dict(params).items():
        parts["mlp" not in path][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


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
