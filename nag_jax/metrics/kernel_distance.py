"""The kernel distance of two sets of feature vectors (Bińkowski et al. 2018, arXiv 1801.01401); KID on Inception's.

The squared maximum mean discrepancy with k(x, y) = (x . y / d + 1)^3, by the unbiased estimator, so it is not biased
by the sample count as a Fréchet distance is, and near zero it may come out below 0. Everything is float64 on the host:
a small difference of large means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nag_jax.errors import UserError
from nag_jax.metrics.checks import check_same_dimension, check_vectors

BLOCK_ROWS = 2048

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KernelDistance:
    """Mean and standard deviation (divided by the number of subsets) of the subsets' distances [num_subsets].

    `std` is the spread of single subsets, as published; subsets overlap, so it is no standard error of the mean.
    """

    mean: float
    std: float
    distances: Array


def kernel_distance(
    x: ArrayLike, y: ArrayLike, *, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> KernelDistance:
    """The mean of unbiased estimates on random subsets of both sets, as published.

    Args:
        x, y: [n, d] and [m, d], finite.
        subset_size: vectors a subset, drawn without repetition: 2 to the smaller of n and m.
        num_subsets: at least 1.
        seed: seed of the draws.

    Raises:
        UserError: wrong shapes, values that are not finite, or a setting out of range.
    """
    x, y = _checked_pair(x, y)
    if num_subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise UserError(
            f"Kernel distance: {num_subsets} subsets of {subset_size} of {len(x)} and {len(y)} vectors; use at least "
            f"1 subset of 2 to {min(len(x), len(y))}."
        )
    rng = np.random.default_rng(seed)
    # One subset's rows at a time: all of them at once would be a needless table.
    draws = (
        (rng.choice(len(x), subset_size, replace=False), rng.choice(len(y), subset_size, replace=False))
        for _ in range(num_subsets)
    )
    distances = np.array([full_kernel_distance(x[x_rows], y[y_rows]) for x_rows, y_rows in draws])
    return KernelDistance(float(distances.mean()), float(distances.std()), distances)


def full_kernel_distance(x: ArrayLike, y: ArrayLike) -> float:
    """One unbiased estimate from all pairs, in blocks: sharper than the mean over subsets of the same vectors.

    Gretton et al. (2012), eq. (3): mean of k over different x, plus over different y, minus twice over x and y. Costs
    about (n + m)^2 d multiply-adds.

    Args:
        x, y: [n, d] and [m, d], finite, n and m at least 2.

    Raises:
        UserError: wrong shapes, or values that are not finite.
    """
    x, y = _checked_pair(x, y)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _diagonal_sum(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _diagonal_sum(y)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * _kernel_sum(x, y) / (n * m))


def _kernel(inner: Array, dimension: int) -> Array:
    base = inner / dimension + 1.0
    return base * base * base


def _kernel_sum(x: NDArray, y: NDArray) -> float:
    """The sum of k over all pairs of a row of x and a row of y."""
    total = 0.0
    for i in range(0, len(x), BLOCK_ROWS):
        rows = x[i : i + BLOCK_ROWS].astype(np.float64)
        for j in range(0, len(y), BLOCK_ROWS):
            inner = rows @ y[j : j + BLOCK_ROWS].astype(np.float64).T
            total += _kernel(inner, x.shape[1]).sum()
    return float(total)


def _diagonal_sum(x: NDArray) -> float:
    return float(_kernel(np.einsum("nd,nd->n", x, x, dtype=np.float64), x.shape[1]).sum())


def _checked_pair(x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    x, y = (check_vectors(values, f"Kernel distance, {name}", at_least=2) for name, values in (("x", x), ("y", y)))
    check_same_dimension(x.shape[1], y.shape[1])
    return x, y
