"""The Gaussian step from one noise level to a lower one, given the data: coefficients of DDPM's posterior.

Shared by the variational loss and by the ancestral sampler; it holds neither a loss nor a sampler. Written with
signal-to-noise ratios, so that nothing cancels and any process may be asked (r = SNR_t / SNR_s, s < t):

    q(x_s | x_t, x_0) = N(x_coefficient x_t + data_coefficient x_0, variance)
    x_coefficient = (alpha_t / alpha_s) sigma_s^2 / sigma_t^2,  data_coefficient = alpha_s (1 - r),
    variance = sigma_s^2 (1 - r),  largest variance = sigma_t^2 (1 - r) = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2

For neighbouring levels of DDPM these are equations 6 and 7 of Ho et al. 2020 (arXiv 2006.11239), and the two variances
the ends of the learned range of Nichol & Dhariwal 2021 (arXiv 2102.09672), equation 15.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nag_jax.diffusion.process import Process, array_module


class AncestralCoefficients(NamedTuple):
    """Coefficients of the step; every field has the shape of the times.

    Attributes:
        x: factor of x_t in the mean.
        data: factor of x_0 in the mean.
        log_variance_min: logarithm of the posterior variance; -inf for a step to clean data, unless floored.
        log_variance_max: logarithm of the variance of x_t given x_s.
    """

    x: Any
    data: Any
    log_variance_min: Any
    log_variance_max: Any

    def log_variance(self, interpolation: Any) -> Any:
        """The learned log-variance for a network's `interpolation` v, nominally in [-1, 1], not clipped."""
        fraction = (interpolation + 1.0) / 2.0
        return fraction * self.log_variance_max + (1.0 - fraction) * self.log_variance_min


def ancestral_coefficients(
    process: Process, t: Any, t_next: Any, floor_step: tuple[float, float] | None = None
) -> AncestralCoefficients:
    """Coefficients of the step from `t` to `t_next`.

    Args:
        process: the noising process.
        t: times that are left, with alpha > 0 or sigma_next > 0 wherever asked; numpy (float64) or JAX.
        t_next: times that are reached, below `t`, of the same shape; 0 is clean data.
        floor_step: (t, t_next) of a step whose posterior variance replaces that of steps to clean data, which is zero.
            DDPM's public code takes the step before the last one. None leaves the logarithm at -inf.

    Returns:
        The coefficients, in the array type of `t`.
    """
    xp = array_module(t)
    ratio = xp.exp(process.log_snr(t) - process.log_snr(t_next))
    variance_t, variance_next = process.sigma(t) ** 2, process.sigma(t_next) ** 2
    with np.errstate(divide="ignore"):
        log_variance_min = xp.log(variance_next * (1.0 - ratio))
        log_variance_max = xp.log(variance_t * (1.0 - ratio))
    if floor_step is not None:
        floor_t, floor_next = (np.float64(time) for time in floor_step)
        floor = ancestral_coefficients(process, floor_t, floor_next).log_variance_min
        log_variance_min = xp.where(variance_next == 0.0, floor, log_variance_min)
    return AncestralCoefficients(
        x=process.alpha(t) / process.alpha(t_next) * variance_next / variance_t,
        data=process.alpha(t_next) * (1.0 - ratio),
        log_variance_min=log_variance_min,
        log_variance_max=log_variance_max,
    )
