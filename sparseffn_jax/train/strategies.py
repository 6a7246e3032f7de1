"""Where a run's arrays live and how its step is compiled: on one device or on a mesh of them.

A tree of arrays is *placed* when its leaves lie on the devices where the compiled step takes them;
their shapes are always those that the model knows. All strategies give the same losses for the
same global batches, but for rounding and dropout.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

from sparseffn_jax.models.decoder import gathering
from sparseffn_jax.ops.plans.choice import refusing
from sparseffn_jax.train import sharding
from sparseffn_jax.train.choices import StrategyName
from sparseffn_jax.train.config import TrainConfig
from sparseffn_jax.train.step import Batch, Stage, TrainState, compiler_options, init_state

# Examples of the step's last three arguments: index, updates and rate_factor.
STEP_SCALARS = (np.int32(0), np.int32(0), np.float32(1.0))


class SingleDevice:
    """Keeps everything on one device; also the interface of all strategies.

    Attributes:
      batch_shards: the number of parts that a batch is cut into, each for other devices.
    """

    batch_shards: int = 1

    def check(self, config: TrainConfig) -> None:
        """Raises ``ValueError`` if the config's batches cannot be cut into the parts needed."""
        parts = self.batch_shards * config.accumulate_steps
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be dealt out to {self.batch_shards} parts "
                f"of {config.accumulate_steps} microbatches: it must be a multiple of {parts}"
            )

    def init_state(self, stage: Stage, params: Any) -> tuple[TrainState, Any]:
        """Returns a fresh train state and the frozen parameters, both placed."""
        return init_state(stage, params)

    def place(self, tree: Any) -> Any:
        """Places a tree that is only read, without copying the leaves that lie right already."""
        return jax.tree.map(jnp.asarray, tree)

    def place_state(self, tree: Any) -> Any:
        """Places a tree so that steps may overwrite what it returns, and nothing else."""
        # A copy: on the CPU backend a view would share the buffers that the next step is given.
        return jax.tree.map(jnp.array, tree)

    def to_host(self, placed: Any) -> Any:
        """Returns a copy of a placed tree in host memory; each process holds what it placed."""
        return jax.tree.map(np.array, placed)

    def abstract(self, tree: Any) -> Any:
        """Returns the leaves' shapes and dtypes, with the shardings in which to restore them."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def gather(self, params: Any) -> Any:
        """Called within the step: brings parameters to where the computation needs them."""
        return params

    def place_batch(self, windows: Shaped[np.ndarray, "n w"], rows: Int[np.ndarray, " b"]) -> Any:
        """Returns the batch ``windows[rows]``, placed; a process reads only what it needs."""
        return windows[rows]

    def place_evaluation(self, batch: Shaped[np.ndarray, "b w"]) -> Any:
        """Returns a batch for evaluation, placed where the parameters are."""
        return batch

    def compile(
        self,
        update: Callable,
        state: Any,
        frozen: Any,
        teacher: Any,
        batch_shape: tuple[int, int],
        *,
        counts: bool = False,
    ) -> Callable:
        """Compiles an :class:`~sparseffn_jax.train.step.Update` for placed arguments.

        Nothing is allocated; :func:`~sparseffn_jax.measure.memory.program_shortage` says whether
        what is returned can run.

        Args:
          update: the update.
          state: the train state, or its shapes and shardings.
          frozen: the parameters that do not train.
          teacher: the teacher's parameters, or ``None``.
          batch_shape: ``(batch_size, window + 1)``, the shape of a batch on all devices together.
          counts: whether a batch says which of its targets count.
        """
        batch = _abstract_batch(batch_shape, counts)
        step = jax.jit(update, donate_argnums=0, compiler_options=compiler_options(state))
        return step.lower(state, frozen, teacher, batch, *STEP_SCALARS).compile()

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which programs for placed parameters are to be traced."""
        return contextlib.nullcontext()

    def report(self, placed: Any) -> str | None:
        """Returns a text on what a user should know about the placement, or ``None``."""
        return None


class MeshSharding(SingleDevice):
    """Lays parameters and batches out on a mesh, as :mod:`sparseffn_jax.train.sharding` says.

    Args:
      mesh: the sizes of the mesh's axes, such as ``"data=2,fsdp=2,tensor=2"``; their product is
        the number of devices.
      devices: the devices of the mesh; by default all that there are.

    Raises:
      ValueError: if the mesh does not fit the devices.
    """

    def __init__(self, mesh: str, devices: Sequence[Any] | None = None):
        sizes = sharding.parse_mesh(mesh)
        self.mesh = sharding.make_mesh(sizes, devices)
        self.batch_shards = sizes["data"] * sizes["fsdp"]
        self._is_split = sizes["fsdp"] * sizes["tensor"] > 1
        self._divides_hidden_units = sizes["tensor"] > 1

    def init_state(self, stage, params):
        state, frozen = init_state(stage, self.place(params), self._jit_sharded)
        return state, frozen

    def place(self, tree):
        return jax.tree.map(_put, tree, sharding.shardings(self.mesh, tree))

    place_state = place

    def to_host(self, placed):
        return jax.tree.map(
            lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), placed
        )

    def abstract(self, tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            sharding.shardings(self.mesh, tree),
        )

    def gather(self, params):
        # Blocks gather their own parameters, one after the other.
        return jax.tree_util.tree_map_with_path(
            lambda path, x, *where: x if sharding.is_in_block(path) else _gathered(x, *where),
            params,
            *self._whole_and_pieces(params),
        )

    def place_batch(self, windows, rows):
        where = NamedSharding(self.mesh, sharding.BATCH_SPEC)
        return jax.make_array_from_callback(
            (len(rows), windows.shape[1]), where, lambda index: windows[rows[cast(Any, index)[0]]]
        )

    def place_evaluation(self, batch):
        # A last batch may be too short to be dealt out; then every device computes all of it.
        deals = len(batch) % self.batch_shards == 0
        spec = sharding.BATCH_SPEC if deals else PartitionSpec()
        return _put(batch, NamedSharding(self.mesh, spec))

    def compile(self, update, state, frozen, teacher, batch_shape, *, counts=False):
        where = NamedSharding(self.mesh, sharding.BATCH_SPEC)
        batch = _abstract_batch(batch_shape, counts, where)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(
            update,
            donate_argnums=0,
            compiler_options=compiler_options(state),
            out_shardings=(sharding.shardings(self.mesh, state), everywhere),
        )
        with self.tracing():
            return step.lower(state, frozen, teacher, batch, *STEP_SCALARS).compile()

    @contextlib.contextmanager
    def tracing(self):
        # The partitioner cannot divide a kernel that was written by hand, and weights that are
        # divided along the side at which they would be joined would have to be sent around.
        reason = "the tokens are divided among devices"
        reasons = {("low_rank_layer", "fused"): reason, ("attention", "flash"): reason}
        if self._divides_hidden_units:
            reason = "the hidden units are divided among devices"
            reasons["core_and_bypass", "joined"] = reason
        with gathering(self._gather_block), refusing(reasons):
            yield

    def report(self, placed):
        whole = sharding.replicated_leaves(placed) if self._is_split else []
        if not whole:
            return None
        lines = [f"  {leaf.path} {leaf.shape}: {leaf.bytes / 2**20:.1f} MiB" for leaf in whole]
        return "\n".join([f"{len(whole)} large leaves are whole on every device:", *lines])

    def _gather_block(self, params: Any, dtype: Any) -> Any:
        def of_leaf(x: jax.Array, whole: NamedSharding, pieces: NamedSharding) -> jax.Array:
            # What travels does so in the precision of the computation.
            return x if whole == pieces else _gathered(x.astype(dtype), whole, pieces)

        return jax.tree.map(of_leaf, params, *self._whole_and_pieces(params))

    def _whole_and_pieces(self, params: Any) -> tuple[Any, Any]:
        # Without these the partitioner may move activations to the pieces of the weights: it sees
        # one axis over both batch and weights, and not that only the weights are to travel.
        whole = sharding.shardings(self.mesh, params, gathered=True)
        return whole, sharding.shardings(self.mesh, params)

    def _jit_sharded(self, function: Callable, argument: Any) -> Any:
        # What does not depend on the argument, such as a moment's zeros, would be replicated.
        result = sharding.shardings(self.mesh, jax.eval_shape(function, argument))
        return jax.jit(function, out_shardings=result)(argument)


Strategy = SingleDevice


def make_strategy(name: StrategyName, mesh: str | None = None) -> Strategy:
    """Returns a strategy by name.

    Args:
      name: ``"single"`` takes one device. ``"pmap"`` does what ``jax.pmap`` would do, on a mesh
        whose ``data`` axis has all devices: each holds all parameters and computes a part of the
        batch. ``"mesh"`` lays parameters and batch out over the axes that ``mesh`` gives.
      mesh: sizes of the mesh's axes, such as ``"data=2,fsdp=2,tensor=2"``; ``"mesh"`` needs it.

    Raises:
      ValueError: if name and mesh do not fit each other or the devices.

    Example:
      >>> import jax
      >>> import sparseffn_jax as sf
      >>> sf.make_strategy("single").batch_shards
      1
      >>> strategy = sf.make_strategy("mesh", f"data={jax.device_count()}")
      >>> strategy.batch_shards == jax.device_count()
      True
    """
    if name not in (names := get_args(StrategyName)):
        raise ValueError(f"unknown strategy {name!r}: expected one of {', '.join(names)}")
    if (name == "mesh") != (mesh is not None):
        raise ValueError(
            f"strategy={name!r} with mesh={mesh!r}: the mesh strategy, and no other, needs the "
            "sizes of a mesh, such as data=2,fsdp=2,tensor=2"
        )
    if mesh is not None:
        return MeshSharding(mesh)
    if name == "single" and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes cannot share one device: take strategy 'pmap' or "
            "'mesh'"
        )
    return MeshSharding(f"data={jax.device_count()}") if name == "pmap" else SingleDevice()


def _abstract_batch(shape: tuple[int, int], counts: bool, where: Any = None) -> Any:
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    counted: Any = jax.ShapeDtypeStruct((shape[0], shape[1] - 1), bool, sharding=where)
    return Batch(tokens, counted) if counts else tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, whole: NamedSharding, pieces: NamedSharding) -> jax.Array:
    del pieces
    return jax.lax.with_sharding_constraint(x, whole)


# A device needs the sum of its own piece of the gradient; by the derivative of the constraint it
# would sum up the whole, and send twice as much.
_gathered.defvjp(
    lambda x, whole, pieces: (_gathered(x, whole, pieces), None),
    lambda whole, pieces, _, gradient: (jax.lax.with_sharding_constraint(gradient, pieces),),
)


def _put(x: Any, where: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable and jax.process_count() > 1):
        return jax.device_put(x, where)
    # Every process has the whole array: each sends its devices only their parts.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
