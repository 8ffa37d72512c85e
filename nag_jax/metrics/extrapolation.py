"""The Fréchet distance over the number of samples, and what it tends to: so that small counts are not misread.

The distance of n samples is biased upward by about c/n, c depending on what made them, so a line through distances over
1/n meets 1/n = 0 at the distance of infinitely many (Chong and Forsyth 2020, arXiv 1911.07023, section 3). The bias
of the reference's own sample count stays in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nag_jax.errors import UserError
from nag_jax.metrics.checks import check_vectors
from nag_jax.metrics.frechet import DistanceTo, Moments

NUM_SIZES = 15


@dataclass(frozen=True, eq=False)
class DistanceCurve:
    """Distances of subsets of the samples, and the least-squares line distance = limit + slope / n.

    Attributes:
        sizes: int [k], the numbers of samples n, rising.
        distances: float64 [k].
        limit: the distance extrapolated to infinitely many samples; near a true distance of 0 it may lie below 0.
        slope: c, in the distance's unit times samples.
        largest_residual: the largest |distance - line|; beside a fall of slope / n it tells whether the line holds.
    """

    sizes: NDArray[np.int64]
    distances: NDArray[np.float64]
    limit: float
    slope: float
    largest_residual: float


def default_sizes(num_samples: int) -> list[int]:
    """15 sizes evenly spaced from a tenth of the samples to all, fewer if those repeat; the paper's 5,000 to 50,000."""
    sizes = np.linspace(max(2, num_samples // 10), num_samples, NUM_SIZES)
    return [int(size) for size in np.unique(sizes.round())]


def distance_curve(
    features: ArrayLike, reference: Moments | DistanceTo, *, sizes: Sequence[int] | None = None, seed: int = 0
) -> DistanceCurve:
    """Fréchet distances of random subsets of the samples to the reference, extrapolated.

    Each size takes a subset of its own, without repetition.

    Args:
        features: [N, d] of the samples, N at least 3.
        reference: moments of the real data, or a `DistanceTo` them that is used again.
        sizes: at least two different numbers from 2 to N; by default `default_sizes(N)`. Sizes well below d lie on no
            line: leave them out.
        seed: seed of the subsets.

    Returns:
        The curve; its limit has a standard error that shrinks with N, not with more sizes.

    Raises:
        UserError: as `moments`, different dimensions, or sizes out of range.
    """
    x = check_vectors(features, "Distance curve", at_least=3)
    chosen = np.unique(default_sizes(len(x)) if sizes is None else np.asarray(sizes, np.int64))
    if len(chosen) < 2 or chosen[0] < 2 or chosen[-1] > len(x):
        raise UserError(
            f"Distance curve: the sizes {chosen.tolist()} of {len(x)} samples; use at least two different sizes from "
            "2 to the number of samples."
        )
    distance_to = reference if isinstance(reference, DistanceTo) else DistanceTo(reference)
    rng = np.random.default_rng(seed)
    distances = np.array([distance_to.of_features(x[rng.permutation(len(x))[:size]]) for size in chosen])
    slope, limit = np.polyfit(1.0 / chosen, distances, 1)
    residuals = distances - (limit + slope / chosen)
    return DistanceCurve(chosen, distances, float(limit), float(slope), float(np.abs(residuals).max()))
