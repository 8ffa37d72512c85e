"""How the rows of a set of feature vectors reach the devices: in blocks of one size, split over the mesh.

What is computed on a block is the metrics'.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from nag_jax.parallel import BATCH_AXES, batch_sharding


def num_parts(mesh: Mesh | None) -> int:
    """How many parts a block's rows are split into; 1 without a mesh."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def block_size(num_rows: int, largest: int, mesh: Mesh | None) -> int:
    """The rows of every block that `num_rows` are cut into: at most `largest`, and divisible over the mesh.

    A mesh of more than `largest` parts gets one row for each.
    """
    parts = num_parts(mesh)
    return parts * max(1, min(-(-num_rows // parts), largest // parts))


def fill_up(rows: np.ndarray, size: int) -> np.ndarray:
    """`rows` with rows of zeros behind them, so that there are `size`."""
    if len(rows) == size:
        return rows
    filled = np.zeros((size, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return filled


def split_rows(rows: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """Puts a block, which every process holds whole, on the devices: its rows over data x fsdp.

    Args:
        rows: [size, ...], size a multiple of `num_parts(mesh)`.
        mesh: None for the default device.
    """
    if mesh is None:
        return jax.device_put(rows)
    return jax.make_array_from_callback(rows.shape, batch_sharding(mesh), lambda index: rows[index])
