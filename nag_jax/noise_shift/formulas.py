"""The noise shift that an additive error of known size should cause, in closed form.

A sampler's state is x_t plus an error e ~ N(0, sigma_e^2 I), and so looks like a state of another level t' = t + delta.
Two rules say which, and they differ because the error leaves the data coefficient alone:
    (1) same noise level (arXiv 2510.12497):  sigma_t'^2 = sigma_t^2 + sigma_e^2
    (2) (1) to first order in delta:          delta = (sqrt(sigma_t^2 + sigma_e^2) - sigma_t) / sigma'_t
    (3) same signal-to-noise ratio (ours):    sigma_t' / alpha_t' = sqrt(sigma_t^2 + sigma_e^2) / alpha_t
After (3) the state is distributed as level t' once it is scaled by alpha_t' / alpha_t. Both presuppose data of low
intrinsic dimension; for spread-out data even the sign can differ, and `measurement.py` asks an estimator instead.
Host computations in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nag_jax.diffusion.process import Process


def shift_at_same_noise(process: Process, t: ArrayLike, sigma_e: ArrayLike) -> np.ndarray:
    """The paper's shift delta, exactly (equation 1).

    Args:
        process: the noising process.
        t: times in [0, 1], any shape.
        sigma_e: standard deviation of the error per dimension, >= 0; broadcasts against `t`.

    Returns:
        delta >= 0, float64; NaN where the process has no level so noisy.
    """
    t, sigma_e = np.asarray(t, np.float64), np.asarray(sigma_e, np.float64)
    return process.time_of_sigma(np.hypot(process.sigma(t), sigma_e)) - t


def shift_at_same_noise_first_order(process: Process, t: ArrayLike, sigma_e: ArrayLike) -> np.ndarray:
    """The paper's shift delta to first order (equation 2); equal to the exact one on the linear path.

    Args:
        process: the noising process.
        t: times in [0, 1], any shape.
        sigma_e: standard deviation of the error per dimension, >= 0; broadcasts against `t`.

    Returns:
        delta >= 0, float64, also where the exact rule has no solution; NaN where sigma' is 0 or infinite.
    """
    t, sigma_e = np.asarray(t, np.float64), np.asarray(sigma_e, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma, sigma_dot = process.sigma(t), process.sigma_dot(t)
        is_regular = np.isfinite(sigma_dot) & (sigma_dot > 0.0)
        return np.where(is_regular, (np.hypot(sigma, sigma_e) - sigma) / sigma_dot, np.nan)


def shift_at_same_snr(process: Process, t: ArrayLike, sigma_e: ArrayLike) -> np.ndarray:
    """The shift delta to the level of the same signal-to-noise ratio (equation 3; derived here, not the paper's).

    Args:
        process: the noising process.
        t: times in [0, 1], any shape.
        sigma_e: standard deviation of the error per dimension, >= 0; broadcasts against `t`.

    Returns:
        delta >= 0, float64; NaN where no level has so little signal. 0 where alpha_t = 0: no signal stays none.
    """
    t, sigma_e = np.asarray(t, np.float64), np.asarray(sigma_e, np.float64)
    alpha, noise = process.alpha(t), np.hypot(process.sigma(t), sigma_e)
    with np.errstate(divide="ignore", invalid="ignore"):
        last = np.float64(process.sigma(np.float64(1.0))) / process.alpha(np.float64(1.0))
        ratio = noise / alpha
        shift = np.where(ratio <= last, process.time_of_ratio(ratio) - t, np.nan)
    return np.where(alpha == 0.0, 0.0, shift)


def scale_at_same_snr(process: Process, t: ArrayLike, sigma_e: ArrayLike) -> np.ndarray:
    """alpha_t' / alpha_t: what to multiply a state by so that it is distributed as the level of equation 3.

    Args:
        process: the noising process.
        t: times in [0, 1], any shape.
        sigma_e: standard deviation of the error per dimension, >= 0; broadcasts against `t`.

    Returns:
        The factor, float64; NaN where `shift_at_same_snr` is NaN.
    """
    t, sigma_e = np.asarray(t, np.float64), np.asarray(sigma_e, np.float64)
    noise = np.hypot(process.sigma(t), sigma_e)
    sigma = process.sigma(t + shift_at_same_snr(process, t, sigma_e))
    # By equation 3 the ratio of the sigmas is that of the alphas, and it holds where alpha_t = 0.
    return np.divide(sigma, noise, out=np.ones(np.broadcast(sigma, noise).shape), where=noise > 0.0)
