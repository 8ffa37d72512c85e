"""Averages of any length after training, put together from stored power-function averages.

After Karras et al. (arXiv 2312.02696, section 3.2 and appendix C): an average is an integral of the parameters over
training, weighted by its profile, a power of time up to its step; the profile wanted is fitted by the stored ones in
the least-squares sense, and the same combination of the stored averages is the average wanted. What a run stores is its
config's: two averages with `ema.NAME.sigma_rel`, such as 0.05 and 0.10, at the steps of `checkpoint.keep_every_steps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from nag_jax.denoiser import Params
from nag_jax.training.ema import power_of

# What is kept of the largest singular value: stored profiles are almost alike.
SMALLEST_SINGULAR_VALUE = 1e-12


class Profile(NamedTuple):
    """The weights of a power-function average: (gamma + 1) tau^gamma / step^(gamma + 1) for tau up to `step`.

    Attributes:
        step: training step at which it was stored.
        sigma_rel: its relative width.
    """

    step: int
    sigma_rel: float


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles over training (arXiv 2312.02696, appendix C.2)."""
    gamma_a, gamma_b = power_of(a.sigma_rel), power_of(b.sigma_rel)
    first = min(a.step, b.step)
    constant = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    # min^(ga + gb + 1) / (ta^(ga + 1) tb^(gb + 1)), without overflow.
    return constant * (first / a.step) ** (gamma_a + 1.0) * (first / b.step) ** (gamma_b + 1.0) / first


def combination(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """How to put an average together.

    Args:
        stored: the profiles at hand.
        wanted: the profile to be fitted.

    Returns:
        (weights float64 [len(stored)] of the stored averages, the fit's relative error: 0 for a stored profile).
    """
    gram = np.array([[inner_product(a, b) for b in stored] for a in stored])
    target = np.array([inner_product(a, wanted) for a in stored])
    # Profiles of unit size make the system as well conditioned as it can be.
    sizes = np.sqrt(np.diagonal(gram))
    gram, target = gram / np.outer(sizes, sizes), target / sizes
    weights, *_ = np.linalg.lstsq(gram, target, rcond=SMALLEST_SINGULAR_VALUE)
    size = inner_product(wanted, wanted)
    error = max(0.0, size - 2.0 * float(weights @ target) + float(weights @ gram @ weights)) / size
    return weights / sizes, float(np.sqrt(error))


def weighted_sum(averages: Iterable[Params], weights: Sequence[float]) -> Params:
    """The sum of weight times average, leaf by leaf in float64, as float32; `averages` are held one at a time."""
    total: Params = None
    for average, weight in zip(averages, weights, strict=True):
        part = jax.tree.map(lambda leaf, weight=weight: np.asarray(leaf, np.float64) * weight, average)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), total)
