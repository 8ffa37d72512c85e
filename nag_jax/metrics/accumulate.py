"""Mean and covariance of a stream of feature vectors, block by block: squares on device, sums on the host.

Here nothing is kept but count, mean and covariance. A whole set of features in memory is `frechet.moments`' case.

A block's sums are float32 around a fixed shift, and blocks merge in float64, so only the rounding within one block is
left: with R rows a block, any order of summation and any split of a block over devices, the covariance C obeys

    |C_ij - exact C_ij| <= (R + 8) 2^-22 sqrt(M_ii M_jj),    M = E[(x - shift) (x - shift)^T],

hence a shift near the mean, where M is the covariance. In practice the error is a hundred times smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from nag_jax.errors import UserError
from nag_jax.metrics.blocks import block_size, fill_up, num_parts, split_rows
from nag_jax.metrics.checks import check_same_dimension
from nag_jax.metrics.frechet import Moments
from nag_jax.parallel import check_batch_size, replicated

MAX_BLOCK_ROWS = 4096

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunningMoments:
    """Moments of the vectors so far.

    Attributes:
        count: number of vectors N.
        mean: float64 [d].
        scatter: float64 [d, d], the sum of (x - mean) (x - mean)^T.
        shift: float32 [d], what every block subtracts before it squares; fixed for the whole stream.
    """

    count: int
    mean: Array
    scatter: Array
    shift: NDArray[np.float32]

    def moments(self) -> Moments:
        """Mean and unbiased covariance. Raises UserError with fewer than 2 vectors."""
        if self.count < 2:
            raise UserError(f"Moments of {self.count} vectors: a covariance needs at least 2.")
        symmetric = 0.5 * (self.scatter + self.scatter.T)
        return Moments(self.count, self.mean, symmetric / (self.count - 1))


class BlockSums(NamedTuple):
    """Sums over the valid rows of a block: their number (int32), y = x - shift (float32 [d]) and y y^T ([d, d])."""

    num_rows: jax.Array
    total: jax.Array
    outer: jax.Array


def start(shift: ArrayLike) -> RunningMoments:
    """No vectors yet.

    Args:
        shift: [d], finite and near the mean to come, such as a reference's mean or the mean of the first block.
    """
    shift = np.asarray(shift, np.float32)
    if shift.ndim != 1 or not np.isfinite(shift).all():
        raise UserError(f"Moments: the shift has shape {list(shift.shape)}; expected [d], finite.")
    return RunningMoments(0, np.zeros(len(shift)), np.zeros((len(shift), len(shift))), shift)


def block_sums(features: jax.Array, valid: jax.Array, shift: jax.Array) -> BlockSums:
    """The sums of one block, pure and for use within `jit`; rows may be split over devices.

    Args:
        features: [rows, d]; rows that are not valid may hold anything, NaN included.
        valid: bool [rows].
        shift: float32 [d].
    """
    y = jnp.where(valid[:, None], features.astype(jnp.float32) - shift, 0.0)
    return BlockSums(
        jnp.sum(valid, dtype=jnp.int32), jnp.sum(y, axis=0), jnp.matmul(y.T, y, precision=jax.lax.Precision.HIGHEST)
    )


def merge(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """The moments of both sets of vectors, Chan, Golub and LeVeque (1979), eq. (2.1); the shift is a's.

    Raises:
        UserError: different dimensions.
    """
    check_same_dimension(a.mean.size, b.mean.size)
    count = a.count + b.count
    if count == 0:
        return a
    gap = b.mean - a.mean
    scatter = np.outer(gap, gap * (a.count * b.count / count))
    scatter += a.scatter
    scatter += b.scatter
    return RunningMoments(count, a.mean + gap * (b.count / count), scatter, a.shift)


def add_block(
    state: RunningMoments, features: jax.Array | np.ndarray, valid: ArrayLike, mesh: Mesh | None = None
) -> RunningMoments:
    """The state after one more block.

    Args:
        state: the vectors so far.
        features: [rows, d], at most 4096 rows: an array that lies on the mesh, or one that every process holds whole.
        valid: bool [rows], false for rows that only fill the block up.
        mesh: over whose data x fsdp axes the rows are split; None for one device. Every process must call.

    Raises:
        UserError: another shape, a block that does not divide over the mesh, or valid rows with NaN, infinity or
            values whose squares overflow float32.
    """
    rows, dimension = features.shape if features.ndim == 2 else (0, 0)
    valid = np.asarray(valid, bool)
    if dimension != state.mean.size or not 1 <= rows <= MAX_BLOCK_ROWS or valid.shape != (rows,):
        raise UserError(
            f"A block of features has shape {list(features.shape)}, its valid rows {list(valid.shape)}; expected "
            f"[rows, {state.mean.size}] and [rows], rows being 1 to {MAX_BLOCK_ROWS}."
        )
    check_batch_size(rows, num_parts(mesh), "parallel.data x parallel.fsdp")
    on_device = features if isinstance(features, jax.Array) else split_rows(features, mesh)
    sums = jax.device_get(_compiled(mesh)(on_device, split_rows(valid, mesh), state.shift))
    # A sum of squares is finite only if each of its terms is.
    if not np.isfinite(np.diagonal(sums.outer)).all():
        raise UserError(
            f"Features after the first {state.count} contain NaN, infinity or values beyond 1e18; "
            "look at the images they came from."
        )
    return merge(state, _of_block(sums, state.shift))


def moments_in_blocks(
    features: np.ndarray, *, block_rows: int = MAX_BLOCK_ROWS, mesh: Mesh | None = None
) -> RunningMoments:
    """The moments of features in memory, computed on the devices around the mean of the first block.

    Args:
        features: [N, d] floating point, N at least 1; every process holds all of it.
        block_rows: rows a block, 1 to 4096; more than N means N.
        mesh: as for `add_block`.

    Raises:
        UserError: as `add_block`, or no features.
    """
    if features.ndim != 2 or not len(features):
        raise UserError(f"Features have shape {list(features.shape)}; expected [N, d] with N at least 1.")
    if not 1 <= block_rows <= MAX_BLOCK_ROWS:
        raise UserError(f"block_rows is {block_rows}; use 1 to {MAX_BLOCK_ROWS}.")
    size = block_size(len(features), block_rows, mesh)
    first = np.asarray(features[:size], np.float64)
    # A row that is not finite is refused, with its place, when its block is added.
    state = start(np.nan_to_num(first.mean(axis=0), nan=0.0, posinf=0.0, neginf=0.0))
    for begin in range(0, len(features), size):
        rows = np.asarray(features[begin : begin + size], np.float32)
        state = add_block(state, fill_up(rows, size), np.arange(size) < len(rows), mesh)
    return state


@functools.cache
def _compiled(mesh: Mesh | None) -> Callable[..., BlockSums]:
    return jax.jit(block_sums, out_shardings=None if mesh is None else replicated(mesh))


def _of_block(sums: BlockSums, shift: NDArray[np.float32]) -> RunningMoments:
    """A block's sums as moments of their own."""
    count, total = int(sums.num_rows), np.asarray(sums.total, np.float64)
    scale = 1.0 / max(count, 1)
    scatter: Array = np.outer(total, -scale * total)
    scatter += sums.outer
    return RunningMoments(count, shift.astype(np.float64) + scale * total, scatter, shift)
