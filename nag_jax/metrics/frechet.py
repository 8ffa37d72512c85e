"""The Fréchet distance between two sets of feature vectors, and bootstrap intervals for it.

Everything is float64 on the host. The distance carries no feature net: it is called FID only on Inception
features and sFID only on their spatial ones, which is for the caller to say (`FeatureNet.distance_label`).

The estimate is biased upward for finite samples, by roughly c/n. So two distances compare only at equal
sample counts, and a distance is read beside the one between two sets of real data of the same sizes (the
floor), computed by these functions. c depends on the distributions as well (Chong and Forsyth 2020), so equal
counts remove most of the bias, not all of it; `extrapolation` estimates the rest.

Round-off: an eigenvalue of A B below d eps times the largest, eps = 2.2e-16, cannot be told from zero and counts as
zero. What is lost with d such eigenvalues is at most 2 d sqrt(d eps) times the largest root, one part in 10^3 of the
largest variance at 2048 dimensions if all spectra reach down to 10^-6 of their largest value, and nothing to speak of
above that. This makes the distance too large. A result below 0 is rounding and becomes 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nag_jax.errors import UserError
from nag_jax.metrics.bootstrap import reflected_ends
from nag_jax.metrics.checks import check_same_dimension, check_vectors

# How far below zero, in parts of the largest, an eigenvalue of a matrix may lie that is still read as a covariance.
INDEFINITE = 1e-3

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a set of feature vectors.

    Attributes:
        count: number of vectors N; None where a file of statistics does not say.
        mean: float64 [d].
        covariance: float64 [d, d], unbiased (divided by N - 1).
    """

    count: int | None
    mean: Array
    covariance: Array


def moments(features: ArrayLike, name: str = "features") -> Moments:
    """Mean and unbiased covariance of feature vectors.

    Args:
        features: [N, d], N at least 2, finite.
        name: what an error calls them.

    Raises:
        UserError: wrong shape, fewer than 2 vectors, or values that are not finite.
    """
    x = _checked(features, name)
    mean = x.mean(axis=0)
    centered = x - mean
    return Moments(len(x), mean, centered.T @ centered / (len(x) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 sqrt(sqrt(A) B sqrt(A))), A and B being the covariances.

    The squared 2-Wasserstein distance of two Gaussians, Dowson and Landau (1982); as a metric for samples,
    Heusel et al. (2017). The root comes from symmetric eigendecompositions, which stay real where a general
    matrix square root of A B turns complex by round-off.

    Args:
        a, b: moments of the same dimension; the order does not matter.

    Returns:
        The distance (0 for equal moments), never negative, in the square of the features' unit.

    Raises:
        UserError: different dimensions, counts below 2, values that are not finite, or a matrix that is no covariance.
    """
    return DistanceTo(a).of_moments(b)


class DistanceTo:
    """Fréchet distances of many sets to one: the root of that one's covariance is taken once.

    Args:
        reference: moments of the fixed set.

    Raises:
        UserError: a count below 2, values that are not finite, or a matrix that is no covariance.
    """

    def __init__(self, reference: Moments) -> None:
        _check(reference, "first")
        self.reference = reference
        self._root = _root(reference.covariance)

    def of_moments(self, other: Moments) -> float:
        """`frechet_distance` of the reference and `other`; the same errors."""
        _check(other, "second")
        check_same_dimension(self.reference.mean.size, other.mean.size)
        product: Array = self._root @ other.covariance @ self._root
        trace_root = np.sqrt(_without_round_off(np.linalg.eigvalsh(product))).sum()
        return _assemble(self.reference.mean - other.mean, self._trace, np.trace(other.covariance), trace_root)

    def of_features(self, features: ArrayLike, name: str = "features") -> float:
        """The same for feature vectors [n, d], accurate also for n below d.

        There the trace of the root is the sum of the singular values of Yc sqrt(A), Yc being the centered features over
        sqrt(n - 1): the squares of those are the eigenvalues of A B that are not zero.

        Raises:
            UserError: as `moments`, or different dimensions.
        """
        y = _checked(features, name)
        check_same_dimension(self.reference.mean.size, y.shape[1])
        if len(y) >= y.shape[1]:
            return self.of_moments(moments(y, name))
        mean = y.mean(axis=0)
        centered = (y - mean) / np.sqrt(len(y) - 1)
        trace_root = np.linalg.svd(centered @ self._root, compute_uv=False).sum()
        return _assemble(self.reference.mean - mean, self._trace, (centered**2).sum(), trace_root)

    @property
    def _trace(self) -> float:
        return float(np.trace(self.reference.covariance))


def frechet_distance_from_features(x: ArrayLike, y: ArrayLike) -> float:
    """The Fréchet distance of two sets of feature vectors, accurate also with fewer vectors than dimensions.

    With fewer vectors than dimensions a covariance is singular, and round-off in its null space would enter
    under a root. There tr sqrt(sqrt(A) B sqrt(A)) is taken as the sum of the singular values of Xc Yc^T /
    sqrt((n - 1)(m - 1)), Xc and
    Yc being the centered features: Xc Yc^T Yc Xc^T has the eigenvalues of A B, times (n - 1)(m - 1).

    Args:
        x: [n, d], n at least 2, finite.
        y: [m, d], m at least 2, finite.

    Returns:
        The same number as `frechet_distance(moments(x), moments(y))`.

    Raises:
        UserError: as `moments`, or different dimensions.
    """
    x, y = _checked(x, "features x"), _checked(y, "features y")
    check_same_dimension(x.shape[1], y.shape[1])
    if min(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(moments(x), moments(y))
    gap = x.mean(axis=0) - y.mean(axis=0)
    xc = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    yc = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    # A tall factor Q R has the singular values of its small R, since Q has orthonormal columns.
    small_x, small_y = (np.asarray(np.linalg.qr(z, mode="r")) if len(z) > z.shape[1] else z for z in (xc, yc))
    trace_root = np.linalg.svd(small_x @ small_y.T, compute_uv=False).sum()
    return _assemble(gap, (xc**2).sum(), (yc**2).sum(), trace_root)


def bootstrap_interval(
    x: ArrayLike, y: ArrayLike, *, num_resamples: int = 200, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """A bootstrap interval for the expected Fréchet distance at these sample counts.

    Both sets are resampled. Resampling repeats vectors, so a resampled distance D* is biased upward from the
    estimate D about as much as D is from the distance of the populations: the plain percentile interval is
    biased twice and can lie wholly above D. What is estimated here is E[D] for fresh sets of the same sizes,
    the number that compares with a floor or another method at the same sizes, by `bootstrap.reflected_ends`.

    It is no interval for the distance of the populations, which lies below E[D] by the finite-sample bias.
    Near a true distance of zero it is too wide rather than too narrow.

    Args:
        x, y: [n, d] and [m, d], as for `frechet_distance_from_features`; meant for d up to a few hundred.
        num_resamples: resamples, at least 20; a 95 % interval is steady from about 200.
        seed: seed of the resampling.
        level: coverage in (0, 1).

    Returns:
        (low, high), with low at least 0.

    Raises:
        UserError: as `moments`, different dimensions, or a setting out of range.
    """
    x, y = _checked(x, "features x"), _checked(y, "features y")
    check_same_dimension(x.shape[1], y.shape[1])

    def statistic(x_counts: Array, y_counts: Array) -> float:
        return frechet_distance(_weighted_moments(x, x_counts), _weighted_moments(y, y_counts))

    low, high = _reflected_interval(statistic, len(x), len(y), num_resamples, seed, level)
    return max(0.0, low), high


def paired_bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    reference: ArrayLike,
    *,
    num_resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """A bootstrap interval for FD(a, reference) - FD(b, reference) of two methods paired by row.

    Row i of `a` and of `b` was made from the same noise and label. Each resample takes the same rows of `a`
    and `b` and the same rows of the reference, so what the two methods share cancels. Estimated is the
    expected difference at these sample counts, centered and reflected as in `bootstrap_interval`.

    Args:
        a, b: [n, d] features of two methods, paired by row.
        reference: [m, d] features of real data.
        num_resamples, seed, level: as in `bootstrap_interval`.

    Returns:
        (low, high); both below 0 means that `a` is closer to the reference.

    Raises:
        UserError: as `bootstrap_interval`, or `a` and `b` of different lengths.
    """
    a, b = _checked(a, "features a"), _checked(b, "features b")
    reference = _checked(reference, "reference features")
    if len(a) != len(b):
        raise UserError(
            f"Paired difference: features a have {len(a)} rows, b {len(b)}; row i of both must be a pair."
        )
    check_same_dimension(a.shape[1], b.shape[1])
    check_same_dimension(a.shape[1], reference.shape[1])

    def statistic(pair_counts: Array, reference_counts: Array) -> float:
        to_real = DistanceTo(_weighted_moments(reference, reference_counts))
        return to_real.of_moments(_weighted_moments(a, pair_counts)) - to_real.of_moments(
            _weighted_moments(b, pair_counts)
        )

    return _reflected_interval(statistic, len(a), len(reference), num_resamples, seed, level)


def _reflected_interval(
    statistic: Callable[[Array, Array], float], n: int, m: int, num_resamples: int, seed: int, level: float
) -> tuple[float, float]:
    """The interval of `bootstrap_interval` for a statistic of two vectors of row counts."""
    if num_resamples < 20:
        raise UserError(f"Bootstrap: num_resamples is {num_resamples}; use at least 20.")
    if not 0.0 < level < 1.0:
        raise UserError(f"Bootstrap: level is {level}; use a value between 0 and 1, such as 0.95.")
    rng = np.random.default_rng(seed)
    # Drawing counts instead of rows resamples without copying a single feature vector.
    n_counts = rng.multinomial(n, np.full(n, 1.0 / n), size=num_resamples).astype(np.float64)
    m_counts = rng.multinomial(m, np.full(m, 1.0 / m), size=num_resamples).astype(np.float64)
    resampled = np.array([statistic(*counts) for counts in zip(n_counts, m_counts, strict=True)])
    low, high = reflected_ends(statistic(np.ones(n), np.ones(m)), resampled, level)
    return float(low), float(high)


def _weighted_moments(x: Array, counts: Array) -> Moments:
    """Moments of the set in which row i of x appears counts[i] times."""
    n = len(x)
    mean = counts @ x / n
    centered = x - mean
    return Moments(n, mean, (centered * counts[:, None]).T @ centered / (n - 1))


def _root(covariance: Array) -> Array:
    """The symmetric square root. Raises UserError for a matrix with an eigenvalue far below zero."""
    values, vectors = np.linalg.eigh(covariance)
    # A covariance that was summed or stored in float32 has eigenvalues below zero, but none so far.
    if values[0] < -INDEFINITE * values[-1]:
        raise UserError(
            f"Fréchet distance: a covariance has the eigenvalue {values[0]:.3g}, its largest being {values[-1]:.3g}; "
            "it is no covariance. Compute these statistics again."
        )
    roots = np.sqrt(_without_round_off(values))
    return (vectors * roots) @ vectors.T


def _assemble(gap: Array, trace_a: float, trace_b: float, trace_root: float) -> float:
    return max(0.0, float(gap @ gap + trace_a + trace_b - 2.0 * trace_root))


def _without_round_off(eigenvalues: NDArray[np.floating]) -> NDArray[np.floating]:
    """Eigenvalues of a positive semi-definite matrix with those indistinguishable from zero set to zero."""
    smallest = eigenvalues.size * np.finfo(np.float64).eps * eigenvalues.max()
    return np.where(eigenvalues > smallest, eigenvalues, 0.0)


def _checked(features: ArrayLike, name: str) -> Array:
    return check_vectors(features, name, at_least=2).astype(np.float64, copy=False)


def _check(m: Moments, side: str) -> None:
    if m.count is not None and m.count < 2:
        raise UserError(f"Fréchet distance: the {side} moments are of {m.count} vectors; use at least 2.")
    if m.covariance.shape != (m.mean.size, m.mean.size):
        shapes = f"covariance has shape {m.covariance.shape}, its mean {m.mean.shape}"
        raise UserError(f"Fréchet distance: the {side} {shapes}; expected [d, d] and [d].")
    if not (np.isfinite(m.mean).all() and np.isfinite(m.covariance).all()):
        raise UserError(f"Fréchet distance: the {side} moments contain NaN or infinity.")
