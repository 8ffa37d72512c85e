"""Where arrays live: the device mesh, shardings of parameters by rule, and batches on their way to the devices.

Nothing here changes what is computed. The mesh has the axes (data, fsdp, tensor): a batch is split over data x fsdp,
parameters over fsdp (and over tensor where a layer is wide).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nag_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Parameters with fewer elements are kept on every device: gathering them costs more than holding them.
SMALLEST_SHARDED = 4096
# Layers of the transformer whose output (columns) or input (rows) is split over the tensor axis. adaLN_modulation is
# not among them: it runs once a sample, so little is gained, and with its six outputs split that way XLA (jax 0.10.2)
# computed wrong values without a word where data, fsdp and tensor were all above 1 and the blocks unrolled.
SPLIT_COLUMNS = ("qkv", "fc1")
SPLIT_ROWS = ("proj", "fc2")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How devices are used.

    Attributes:
        mode: "jit" (one program over the mesh) or "pmap" (the same step, data-parallel only).
        data: devices along the data axis; -1 takes all that the other axes leave.
        fsdp: devices along which parameters, optimizer state and averages are split, besides the batch.
        tensor: devices along which wide layers are split.
        steps_per_dispatch: training steps that run as one program, for steps so short that starting each would count.
    """

    mode: Literal["jit", "pmap"] = "jit"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    steps_per_dispatch: int = 1

    def __post_init__(self) -> None:
        if self.steps_per_dispatch < 1 or (self.steps_per_dispatch > 1 and self.mode == "pmap"):
            raise UserError(
                f"parallel.steps_per_dispatch = {self.steps_per_dispatch} must be at least 1, and 1 under "
                "parallel.mode = 'pmap'."
            )
        if self.mode not in ("jit", "pmap"):
            raise UserError(f"parallel.mode = {self.mode!r} is not one of jit, pmap.")
        if self.mode == "pmap" and (self.fsdp, self.tensor) != (1, 1):
            raise UserError("parallel.mode = 'pmap' is data-parallel: set parallel.fsdp = parallel.tensor = 1.")


def make_mesh(config: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh; of devices in several slices, such as TPU pods joined by a network, data goes across slices.

    Args:
        config: sizes of its axes.
        devices: what it is made of; all that there are if None.

    Raises:
        UserError: the axes do not multiply to the number of devices, or fsdp x tensor does not fit into a slice.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = [config.data, config.fsdp, config.tensor]
    others = config.fsdp * config.tensor
    if min(config.fsdp, config.tensor) >= 1 and config.data == -1 and count % others == 0:
        shape[0] = count // others
    if min(shape) < 1 or math.prod(shape) != count:
        fitting = ", ".join(
            f"{data}x{fsdp}x{count // (data * fsdp)}"
            for data in range(count, 0, -1)
            for fsdp in range(1, count + 1)
            if count % (data * fsdp) == 0
        )
        raise UserError(
            f"parallel.data x fsdp x tensor = {config.data}x{config.fsdp}x{config.tensor} does not use the {count} "
            f"device(s) exactly. What fits: {fitting}."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    if shape[0] % slices:
        raise UserError(
            f"The {count} devices are {slices} slices of {count // slices}, and only the data axis goes across slices: "
            f"parallel.data = {shape[0]} must be a multiple of {slices}. Let parallel.fsdp x parallel.tensor divide "
            f"{count // slices}."
        )
    within = (shape[0] // slices, config.fsdp, config.tensor)
    placed = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def pmap_sharding(axis_name: str) -> NamedSharding:
    """The sharding of a training state under `pmap`: every device holds all of it.

    A state that is put or restored there before the first step spares a second compilation.
    """
    return NamedSharding(Mesh(np.array(jax.devices()), (axis_name,)), PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, to be compiled for `mesh`, with `keep_rows_apart` in force inside it."""

    @functools.wraps(function)
    def inside(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return inside


def keep_rows_apart(x: jax.Array) -> jax.Array:
    """Keeps the rows of an activation where they are in the batch, in what `on_mesh` or `jax.set_mesh` compiles.

    Otherwise the compiler is free to split activations as parameters are, along features, and to gather the whole batch
    on every device: for a TPU it did, and a step whose parameters were split sixteenfold needed seven times the memory.

    Args:
        x: [B, ...].

    Returns:
        x; untouched where there is no mesh or the rows do not divide over it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def on_own_rows_and_heads(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` called by each device for its own rows and heads, in what `on_mesh` or `jax.set_mesh` compiles.

    For what the compiler cannot split over devices, such as Pallas' kernels. Rows or heads that do not divide are
    computed by every device; without a mesh nothing changes.

    Args:
        function: of arrays [B, T, heads, head_dim], to an array of that shape.
    """

    def split(*arrays: jax.Array) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if not set(AXES) <= set(mesh.axis_names):
            return function(*arrays)
        rows, _, heads, _ = arrays[0].shape
        spec = PartitionSpec(
            BATCH_AXES if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None,
            None,
            "tensor" if heads % mesh.shape["tensor"] == 0 else None,
        )
        # Kernels do not say along which axes their results differ, so that cannot be checked.
        return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return split


def partition_spec(mesh: Mesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The rule for one parameter.

    Args:
        mesh: gives the sizes of the axes.
        path: names from the root, "/" between them; only the end of it matters, so a parameter's moments and averages
            are split as it is.
        shape: its shape; blocks under a scan have the layer first, which is never split.

    Returns:
        tensor on the columns or rows of a wide layer's kernel, fsdp on the largest remaining axis that divides; axes
        that do not divide and small parameters are not split.
    """
    names = path.split("/")
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < SMALLEST_SHARDED or len(shape) < 2:
        return PartitionSpec()
    matrix = [len(shape) - 2, len(shape) - 1]
    layer = names[-2] if names[-1] == "kernel" and len(names) > 1 else ""
    column, row = matrix[1], matrix[0]
    for layers, axis in ((SPLIT_COLUMNS, column), (SPLIT_ROWS, row)):
        if layer in layers and shape[axis] % mesh.shape["tensor"] == 0:
            axes[axis] = "tensor"
    free = [axis for axis in matrix if axes[axis] is None and shape[axis] % mesh.shape["fsdp"] == 0]
    if free:
        axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
    return PartitionSpec(*axes)


def param_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Shardings for a tree of parameters, or for a whole training state, by `partition_spec`.

    Args:
        mesh: the mesh.
        abstract: tree of arrays or of their shapes (`jax.eval_shape`).

    Returns:
        The same tree of NamedShardings.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(mesh, path_name(path), tuple(leaf.shape)))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def path_name(path: tuple) -> str:
    """A tree path as names with "/" between them."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_sharded(init: Callable[..., Any], mesh: Mesh, *arguments: Any) -> tuple[Any, Any]:
    """Runs `init(*arguments)` so that every parameter is made where it lives.

    Args:
        init: pure function that makes parameters or a training state.
        mesh: the mesh.
        *arguments: its arguments, such as a key.

    Returns:
        (what `init` returns, its shardings).
    """
    shardings = param_shardings(mesh, jax.eval_shape(init, *arguments))
    return jax.jit(init, out_shardings=shardings)(*arguments), shardings


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of the global batch that this process must read.

    Raises:
        UserError: the batch does not divide over the mesh, or this process' rows are not in one piece.
    """
    check_batch_size(batch_size, mesh.shape["data"] * mesh.shape["fsdp"], "parallel.data x parallel.fsdp")
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    pieces = sorted({piece[0].indices(batch_size)[:2] for piece in indices.values() if piece is not None})
    if any(end != start for (_, end), (start, _) in zip(pieces[:-1], pieces[1:], strict=True)):
        raise UserError(
            "The rows of this process are not in one piece on this mesh. Let parallel.fsdp x parallel.tensor be a "
            "multiple of the devices of a process, or divide them."
        )
    return slice(pieces[0][0], pieces[-1][1])


def batch_part(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of the global batch this process must read, as (number, of how many equal parts).

    Processes that differ along the tensor axis alone read the same one. Raises UserError as `local_rows` does.
    """
    rows = local_rows(mesh, batch_size)
    size = rows.stop - rows.start
    return rows.start // size, batch_size // size


def holds_first_copy(array: jax.Array) -> bool:
    """Whether the rows of `local_part` are this process' to write, and not copies of another one's."""
    return any(shard.replica_id == 0 for shard in array.addressable_shards)


def row_by_row(function: Callable[[Any, jax.Array], Any], mesh: Mesh) -> Callable[[Any, jax.Array], Any]:
    """`function` (params, rows) compiled for a mesh: params on every device, each with its own rows of a batch."""
    rows = PartitionSpec(BATCH_AXES)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows))


def local_part(array: jax.Array) -> np.ndarray:
    """The rows of an array split by `batch_sharding` that are this process', in order: those of `local_rows`."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])


def shard_batch(mesh: Mesh, host_batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process' rows of a batch on its devices.

    Args:
        mesh: the mesh.
        host_batch: arrays whose first axis is this process' rows (`local_rows`).

    Returns:
        Global arrays, split over data x fsdp.

    Raises:
        UserError: the global batch does not divide over data x fsdp.
    """
    sharding = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = sharding.addressable_devices_indices_map((parts,))
    local_parts = len({piece[0].start for piece in indices.values() if piece is not None})
    rows = len(next(iter(host_batch.values())))
    check_batch_size(rows * parts // local_parts, parts, "parallel.data x parallel.fsdp")
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in host_batch.items()}


def split_batch(host_batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reshapes this process' rows [B, ...] for `pmap`: [local devices, B / local devices, ...].

    Raises:
        UserError: the rows do not divide over the devices of this process.
    """
    devices = jax.local_device_count()
    check_batch_size(len(next(iter(host_batch.values()))), devices, "the devices of a process")
    return {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in host_batch.items()}


def check_batch_size(batch_size: int, parts: int, what: str) -> None:
    """Raises UserError, with the nearest sizes that would do, unless `batch_size` is a positive multiple of `parts`."""
    if batch_size >= 1 and batch_size % parts == 0:
        return
    below = batch_size // parts * parts
    sizes = [str(size) for size in (below, below + parts) if size >= 1]
    raise UserError(
        f"A batch of {batch_size} examples does not split evenly over {what} = {parts}. "
        f"Set batch_size to a multiple of {parts}, such as {' or '.join(sizes)}."
    )


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays on the devices.

    Args:
        tree: of host arrays, the same on every process, or of arrays that are on the devices already.
        shardings: the same tree of shardings, or one for all.

    Returns:
        Global arrays. On several processes each copies its own parts only, where `jax.device_put` would send all of
        every array between them to compare.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(_place, tree, shardings)


def _place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(tree: Any) -> Any:
    """A tree of arrays as numpy arrays; every process must call it, for parts of them may lie with other processes."""
    return jax.tree.map(_to_host, tree)


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def local_mesh() -> Mesh:
    """A mesh of this process' devices, all of them along "data"."""
    return Mesh(np.array(jax.local_devices()).reshape(-1, 1, 1), AXES)


def local_sharding(*axes: str) -> NamedSharding:
    """A sharding over `local_mesh`; with no axes every device holds all."""
    return NamedSharding(local_mesh(), PartitionSpec(*axes))
