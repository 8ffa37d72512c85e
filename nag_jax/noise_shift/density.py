"""Gaussian kernel density of an estimator's answers.

Written out because the bandwidth needs a floor: at a level where an estimator says the same for every state, the usual
rules give none at all.
"""

from __future__ import annotations

import numpy as np

SMALLEST_BANDWIDTH = 1e-4


def bandwidth(answers: np.ndarray) -> float:
    """Silverman's rule .9 min(std, IQR / 1.349) N^(-1/5) for `answers` [N], at least SMALLEST_BANDWIDTH.

    Where half of the answers are equal the rule's quartiles say nothing, and the standard deviation alone is used.
    """
    lower, upper = np.percentile(answers, [25.0, 75.0])
    spread = np.std(answers)
    if upper > lower:
        spread = min(spread, (upper - lower) / 1.349)
    return float(max(0.9 * spread * len(answers) ** -0.2, SMALLEST_BANDWIDTH))


def density_grid(*answers: np.ndarray, num_points: int = 400) -> np.ndarray:
    """A grid [num_points] that holds all but nothing of the kernel densities of several sets of answers."""
    lows = [values.min() - 4.0 * bandwidth(values) for values in answers]
    highs = [values.max() + 4.0 * bandwidth(values) for values in answers]
    return np.linspace(min(lows), max(highs), num_points)


def kernel_density(answers: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The kernel density of `answers` [N] at the points `grid` [G]: [G].

    The grid should resolve the bandwidth: where its spacing is wider than that, the spacing is the bandwidth, so that
    the density's sum times the spacing stays 1.
    """
    width = max(bandwidth(answers), float(np.diff(grid).max()))
    total = np.zeros(len(grid))
    for chunk in np.array_split(answers, max(1, len(answers) // 4096)):
        total += np.exp(-0.5 * ((grid[:, None] - chunk) / width) ** 2).sum(axis=1)
    return total / (len(answers) * width * np.sqrt(2.0 * np.pi))
