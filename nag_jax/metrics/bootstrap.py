"""The ends of a bootstrap interval for a statistic that is biased in a resample as it is in the sample.

What is resampled, and what the statistic is, is the caller's.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def reflected_ends(
    estimate: ArrayLike, resampled: ArrayLike, level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The centered and reflected ("basic") interval, Davison and Hinkley (1997), section 5.2, for E[S].

    For a statistic S >= 0 that sampling error can only make larger, a resample S* is biased from S about as much as S
    is from the value of the population: a percentile interval is biased twice. Here S* - mean(S*) stands for S - E[S],
    which gives [S + mean(S*) - q_high(S*), S + mean(S*) - q_low(S*)].

    Args:
        estimate: S, any shape.
        resampled: S*, [resamples, ...].
        level: coverage in (0, 1).

    Returns:
        (low, high), each of the shape of `estimate`.
    """
    resampled = np.asarray(resampled, np.float64)
    tail = 0.5 * (1.0 - level)
    center = np.asarray(estimate, np.float64) + resampled.mean(axis=0)
    q_low, q_high = np.quantile(resampled, [tail, 1.0 - tail], axis=0)
    return center - q_high, center - q_low
