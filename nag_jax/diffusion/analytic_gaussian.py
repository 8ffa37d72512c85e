"""Exact states of a sampler whose score is wrong by a known factor, for isotropic Gaussian data.

Data N(0, lambda I) have the score -x / S, S = alpha^2 lambda + sigma^2. Here a probability-flow sampler uses
s~ = (1 + eta) score instead. Its noise shift is known exactly, with and without Noise Awareness Guidance. Host
computations in float64; no samplers and no JAX programs.

Equations (n^2 = alpha^2 + sigma^2, phi = arctan(sigma / alpha), r = |x|^2):
    (1) dx/dt = (alpha'/alpha) x - sigma (sigma' - alpha' sigma / alpha) s~
    (2) s~ = -(1 + eta) x / S turns (1) into d log V / dt = -2 eta alpha'/alpha + (1 + eta) S'/S for the variance V of
        the states, so that alpha^(2 eta) S^-(1 + eta) V does not change with t
    (3) s_w = (1 + w) s~(x | t) - w s~(x), s~(x) = sum_i p(t_i | x) s~(x | t_i), where p(t_i | x) depends on x through
        r alone. Every term is parallel to x, so s_w = g(t, r) x, the sampler never turns a state, and
        d log(r / n^2) / d phi = -2 tan(phi) (1 + n^2 g)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.special import softmax

from nag_jax.diffusion.process import PredictionKind, Process
from nag_jax.errors import UserError


def perturbed_variance(
    process: Process,
    data_variance: ArrayLike,
    score_error: float,
    times: ArrayLike,
    initial_variance: ArrayLike | None = None,
) -> np.ndarray:
    """Variance per dimension of the states of a sampler that uses (1 + score_error) times the exact score.

    Args:
        process: the noising process.
        data_variance: lambda, a scalar (or one per eigen-direction of a covariance).
        score_error: eta; 0 gives the variance of true states.
        times: [N] from the sampler's first time on, alpha > 0 at all of them.
        initial_variance: variance at times[0]; default that of true states.

    Returns:
        [N] or, for several directions, [N, directions]: the variance at each time (equation 2).
    """
    times = _checked_times(process, times)
    times = times.reshape(times.shape + (1,) * np.ndim(data_variance))
    alpha = process.alpha(times)
    true_variance = alpha**2 * np.asarray(data_variance) + process.sigma(times) ** 2
    start = true_variance[0] if initial_variance is None else np.asarray(initial_variance)
    return start * (alpha[0] / alpha) ** (2.0 * score_error) * (true_variance / true_variance[0]) ** (1.0 + score_error)


def perturbed_radius(
    process: Process,
    data_variance: float,
    score_error: float,
    nag_scale: float,
    dimension: int,
    initial_radius: float,
    times: ArrayLike,
    levels: ArrayLike,
    level_weights: ArrayLike | None = None,
    null_kind: PredictionKind = "score",
) -> np.ndarray:
    """|x|^2 along the trajectory of a sampler with a wrong score and Noise Awareness Guidance (equation 3).

    Args:
        process: the noising process.
        data_variance: lambda.
        score_error: eta.
        nag_scale: w; 0 is no guidance.
        dimension: size of x.
        initial_radius: |x|^2 at times[0].
        times: [N], strictly monotone, alpha > 0 at all of them.
        levels: [T], the noise levels of the prior p(t).
        level_weights: [T], their probabilities; default equal.
        null_kind: the target that the null branch averages over p(t | x): "score" for the true s~(x); any other is
            averaged as it is and turned into a score at the sampler's t.

    Returns:
        [N]: |x|^2 at each time, to about ten digits.
    """
    times = _checked_times(process, times)
    levels = np.asarray(levels, np.float64)
    level_weights = np.ones_like(levels) if level_weights is None else np.asarray(level_weights, np.float64)
    level_variance = process.alpha(levels) ** 2 * data_variance + process.sigma(levels) ** 2
    log_prior = np.log(level_weights) - 0.5 * dimension * np.log(level_variance)
    a, b = process.conversion(levels, "score", null_kind)
    level_targets = a - b * (1.0 + score_error) / level_variance

    def slope(angle: float, log_radius: np.ndarray) -> np.ndarray:
        t = np.float64(process.time_of_ratio(np.tan(angle)))
        alpha, sigma = process.alpha(t), process.sigma(t)
        norm = alpha**2 + sigma**2
        conditional = -(1.0 + score_error) / (alpha**2 * data_variance + sigma**2)
        posterior = softmax(log_prior - 0.5 * norm * np.exp(log_radius[0]) / level_variance)
        a, b = process.conversion(t, null_kind, "score")
        null = a + b * (posterior @ level_targets)
        guided = (1.0 + nag_scale) * conditional - nag_scale * null
        return np.array([-2.0 * np.tan(angle) * (1.0 + norm * guided)])

    alpha, sigma = process.alpha(times), process.sigma(times)
    angles, norms = np.arctan2(sigma, alpha), alpha**2 + sigma**2
    start = np.log(initial_radius / norms[0])
    solution = solve_ivp(
        slope, (angles[0], angles[-1]), [start], method="DOP853", t_eval=angles, rtol=1e-10, atol=1e-10
    )
    if not solution.success:
        raise ArithmeticError(f"The radius could not be integrated: {solution.message}")
    return norms * np.exp(solution.y[0])


def _checked_times(process: Process, times: ArrayLike) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if (process.alpha(times) <= 0.0).any():
        raise UserError("A wrong score has no finite velocity where alpha = 0: start below t = 1.")
    return times
