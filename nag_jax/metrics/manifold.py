"""Precision and recall, density and coverage: how samples and real data lie within each other's balls.

A set's manifold is the union of a ball around each of its vectors, reaching to that vector's k-th nearest other one.
    precision: share of samples inside the real manifold    recall: share of real vectors inside the samples' manifold
        (Kynkäänniemi et al. 2019, arXiv 1904.06991, eqs. 1-2; k = 3, a boundary belongs to its ball)
    density: real balls that hold a sample, over k, mean    coverage: share of real balls that hold any sample
        (Naeem et al. 2020, arXiv 2002.09797, eqs. 3-4; k = 5)
The authors' code for the latter takes open balls (`<`); here every ball is closed, which differs only for ties.

Every decision is exact for the features given. Distances are float32 matrix products on the devices, as elsewhere, but
|a|^2 + |b|^2 - 2 a.b loses digits where vectors are near, and a sample that is a copy of a real image lies exactly on
the boundary of balls, where one bit decides. So a product only decides where its rounding bound allows no other
answer; the few pairs left are recomputed from differences in float64, by one function, which makes ties ties. Published
evaluators let float16 or float32 products decide, which moves precision in the third or fourth digit.

A pass holds one block of rows against all vectors of the other set: 2^25 distances a device at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from nag_jax.errors import UserError
from nag_jax.metrics.blocks import block_size, fill_up, num_parts, split_rows
from nag_jax.metrics.checks import check_same_dimension, check_vectors
from nag_jax.parallel import replicated

DISTANCES_PER_DEVICE = 2**25
# Numbers that a host computation holds at a time, beside the features themselves.
HOST_ELEMENTS = 2**22

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Manifold:
    """A set of feature vectors and the balls around them.

    Attributes:
        features: [n, d].
        squared_radii: float64 [n, largest k]; column k - 1 is the squared distance to the k-th nearest other vector.
    """

    features: NDArray
    squared_radii: Array


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Density at least 0, about 1 for samples like the real data and possibly above; coverage in [0, 1]."""

    density: float
    coverage: float


def manifold(features: ArrayLike, *, largest_k: int = 5, mesh: Mesh | None = None) -> Manifold:
    """The balls of a set, for every k up to `largest_k`; a reference's are computed once for many sets of samples.

    Args:
        features: [n, d] float32 or float64, n above `largest_k`; every process holds all of them.
        largest_k: at least 1. A vector is not its own neighbour, but a copy of it is.
        mesh: over whose data x fsdp axes the work is split; None for one device. Every process must call.

    Raises:
        UserError: wrong shape, values that are not finite, or not enough vectors for `largest_k`.
    """
    x = check_vectors(features, "Manifold", at_least=2)
    if not 1 <= largest_k < len(x):
        raise UserError(f"Manifold: largest_k is {largest_k} for {len(x)} vectors; use 1 to {len(x) - 1}.")
    operands = _Operands(x, x, mesh)
    squared_radii = np.empty((len(x), largest_k))
    # Copies are known by their bytes, so that a collapsed generator does not leave every pair to float64.
    groups, group_sizes = _groups_of_copies(x)
    column_groups, num_copies = operands.on_every_device(groups), np.minimum(group_sizes[groups] - 1, largest_k)
    near = _compiled(_near, mesh, largest_k)
    for begin, end, rows in operands.blocks():
        row_groups = split_rows(fill_up(groups[begin:end], rows.shape[0]), mesh)
        i, j = _positions(np.asarray(near(rows, row_groups, operands.columns, column_groups))[: end - begin])
        copies = np.repeat(np.arange(end - begin), num_copies[begin:end])
        distances = np.concatenate([np.zeros(len(copies)), squared_distances(x, x, begin + i, j)])
        i = np.concatenate([copies, i])
        order = np.lexsort((distances, i))
        first = np.searchsorted(i[order], np.arange(end - begin))
        squared_radii[begin:end] = distances[order][first[:, None] + np.arange(largest_k)]
    return Manifold(x, squared_radii)


def precision_recall(
    samples: Manifold, reference: Manifold, *, k: int = 3, mesh: Mesh | None = None
) -> PrecisionRecall:
    """Improved precision and recall; `k` as in the published evaluators.

    Raises:
        UserError: different dimensions, or a k that a manifold has no radii for.
    """
    in_reference, _ = _membership(samples.features, reference, k, mesh)
    in_samples, _ = _membership(reference.features, samples, k, mesh)
    return PrecisionRecall(float((in_reference > 0).mean()), float((in_samples > 0).mean()))


def density_coverage(
    samples: ArrayLike, reference: Manifold, *, k: int = 5, mesh: Mesh | None = None
) -> DensityCoverage:
    """Density and coverage of sample features [n, d]; they need no balls of their own.

    Raises:
        UserError: wrong shape, values that are not finite, different dimensions, or a k that has no radii.
    """
    counts, is_hit = _membership(check_vectors(samples, "Density and coverage"), reference, k, mesh)
    return DensityCoverage(float(counts.mean() / k), float(is_hit.mean()))


def squared_distances(x: NDArray, y: NDArray, i: NDArray, j: NDArray) -> Array:
    """|x_i - y_j|^2 of pairs of rows in float64, the same bits for a pair in either order and in any company."""
    result = np.empty(len(i))
    step = max(1, HOST_ELEMENTS // x.shape[1])
    for begin in range(0, len(i), step):
        pairs = slice(begin, begin + step)
        difference = x[i[pairs]].astype(np.float64) - y[j[pairs]]
        result[pairs] = np.square(difference).sum(axis=1)
    return result


def _membership(queries: NDArray, centers: Manifold, k: int, mesh: Mesh | None) -> tuple[NDArray, NDArray]:
    """(the number of balls that hold each query [queries], whether each ball holds any query [centers])."""
    check_same_dimension(queries.shape[1], centers.features.shape[1])
    if not 1 <= k <= centers.squared_radii.shape[1]:
        raise UserError(
            f"Manifold: k is {k}, but radii are known for k = 1 to {centers.squared_radii.shape[1]}; "
            "make the manifold with a larger largest_k."
        )
    radii = centers.squared_radii[:, k - 1]
    operands = _Operands(queries, centers.features, mesh)
    scaled_radii = operands.on_every_device((radii * operands.scale**2).astype(np.float32))
    counts, is_hit = np.zeros(len(queries), np.int64), np.zeros(len(radii), bool)
    within = _compiled(_within, mesh, None)
    for begin, end, rows in operands.blocks():
        valid = split_rows(np.arange(rows.shape[0]) < end - begin, mesh)
        found = within(rows, valid, operands.columns, scaled_radii)
        counts[begin:end] = np.asarray(found.counts)[: end - begin]
        is_hit |= np.asarray(found.is_hit)
        if found.any_unsure:
            i, j = _positions(np.asarray(found.is_unsure)[: end - begin])
            is_inside = squared_distances(queries, centers.features, begin + i, j) <= radii[j]
            np.add.at(counts, begin + i[is_inside], 1)
            is_hit[j[is_inside]] = True
    return counts, is_hit


def _groups_of_copies(x: NDArray) -> tuple[NDArray[np.int32], NDArray]:
    """(the group of each row, equal for rows of equal bytes; the number of rows of each group)."""
    bytes_of_rows = np.ascontiguousarray(x).view(np.dtype((np.void, x.dtype.itemsize * x.shape[1]))).ravel()
    _, groups, sizes = np.unique(bytes_of_rows, return_inverse=True, return_counts=True)
    return groups.astype(np.int32), sizes


def _positions(mask: np.ndarray) -> tuple[NDArray, NDArray]:
    """Row and column of every true entry, row by row; much faster than np.nonzero of a matrix."""
    i, j = np.divmod(np.flatnonzero(mask.ravel()), mask.shape[1])
    return i, j


class _Operands:
    """Two sets as the devices see them: float32 around the second's mean, scaled so that no square overflows.

    Distances depend on neither; products are the more accurate the smaller the norms.
    """

    def __init__(self, rows: NDArray, columns: NDArray, mesh: Mesh | None) -> None:
        self.rows, self.mesh = rows, mesh
        # Exact for copies of one float32 vector, which are all zero then and leave nothing to decide.
        self.center = columns.mean(axis=0, dtype=np.float64)
        largest = max(float(np.abs(part - self.center).max()) for x in (rows, columns) for part in _host_parts(x))
        # A power of two: scaling rounds nothing.
        self.scale = 2.0 ** -np.frexp(largest)[1]
        centered = np.concatenate([self._center(part) for part in _host_parts(columns)])
        self.columns = self.on_every_device(centered)

    def blocks(self) -> Iterator[tuple[int, int, jax.Array]]:
        """(begin, end, rows from begin to end and rows of zeros behind them, split over the devices)."""
        per_device = max(1, DISTANCES_PER_DEVICE // self.columns.shape[0])
        size = block_size(len(self.rows), per_device * num_parts(self.mesh), self.mesh)
        for begin in range(0, len(self.rows), size):
            part = self.rows[begin : begin + size]
            centered = np.concatenate([self._center(few) for few in _host_parts(part)])
            yield begin, begin + len(part), split_rows(fill_up(centered, size), self.mesh)

    def on_every_device(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(array.shape, replicated(self.mesh), lambda index: array[index])

    def _center(self, part: NDArray) -> NDArray[np.float32]:
        return ((part - self.center) * self.scale).astype(np.float32)


def _host_parts(x: NDArray) -> Iterator[NDArray]:
    """x in parts small enough for a float64 copy."""
    step = max(1, HOST_ELEMENTS // x.shape[1])
    for begin in range(0, len(x), step):
        yield x[begin : begin + step]


class _Within(NamedTuple):
    """Pairs (row, column) of a block: surely inside by row and by column, and those that float32 does not decide."""

    counts: jax.Array
    is_hit: jax.Array
    is_unsure: jax.Array
    any_unsure: jax.Array


def _within(rows: jax.Array, valid: jax.Array, columns: jax.Array, squared_radii: jax.Array) -> _Within:
    low, high = _distance_bounds(rows, columns)
    is_sure = (high <= squared_radii) & valid[:, None]
    is_unsure = (low <= squared_radii) & valid[:, None] & ~is_sure
    return _Within(
        jnp.sum(is_sure, axis=1, dtype=jnp.int32), jnp.any(is_sure, axis=0), is_unsure, jnp.any(is_unsure)
    )


def _near(
    k: int, rows: jax.Array, row_groups: jax.Array, columns: jax.Array, column_groups: jax.Array
) -> jax.Array:
    """Bool [rows, columns]: a few columns for each row; with the row's copies, its k nearest others are among them."""
    low, high = _distance_bounds(rows, columns)
    is_copy = row_groups[:, None] == column_groups
    # The row itself and k others are no farther than the (k + 1)-th smallest upper bound.
    farthest = -jax.lax.top_k(jnp.where(is_copy, 0.0, -high), k + 1)[0][:, -1]
    return (low <= farthest[:, None]) & ~is_copy


def _distance_bounds(rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers [rows, columns] between which the squared distance lies, with room for float32's rounding.

    In any order of summation a product of d terms is wrong by at most d 2^-24 |a| |b| <= d 2^-25 (|a|^2 + |b|^2), and a
    squared norm by d 2^-24 of itself: together 2 d 2^-24 (|a|^2 + |b|^2), and a few more for rounding the vectors, the
    sums and what they are compared with. Twice that leaves room for a device whose float32 products are a little worse.
    """
    row_norms, column_norms = (jnp.sum(jnp.square(x), axis=1) for x in (rows, columns))
    norms = row_norms[:, None] + column_norms
    product = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    distance = norms - 2.0 * product
    bound = (rows.shape[1] + 16) * 2.0**-22 * norms
    return distance - bound, distance + bound


@functools.cache
def _compiled(function: Callable, mesh: Mesh | None, k: int | None) -> Callable:
    """`function`, with its static k if it has one; what it returns is whole on every process."""
    fixed = function if k is None else functools.partial(function, k)
    return jax.jit(fixed, out_shardings=None if mesh is None else replicated(mesh))
