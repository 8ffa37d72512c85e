"""Samplers with a wrong score on Gaussian data: the closed form and the radius against brute integration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from nag_jax.diffusion.analytic import make_mixture
from nag_jax.diffusion.analytic_gaussian import perturbed_radius, perturbed_variance
from nag_jax.diffusion.process import DDPM, GVP, Linear, Process
from nag_jax.errors import UserError

by_process = pytest.mark.parametrize("process", [Linear(), GVP(), DDPM()], ids=lambda process: process.name)
TIMES = np.linspace(0.95, 0.05, 7)


@by_process
def test_variance_without_error_is_that_of_true_states(process: Process) -> None:
    np.testing.assert_allclose(
        perturbed_variance(process, 0.3, 0.0, TIMES),
        process.alpha(TIMES) ** 2 * 0.3 + process.sigma(TIMES) ** 2,
    )


@pytest.mark.parametrize("process", [Linear(), GVP()], ids=lambda process: process.name)
@pytest.mark.parametrize("score_error", [-0.05, 0.1])
def test_variance_solves_its_equation(process: Process, score_error: float) -> None:
    """dV/dt = 2 a V with x' = a x, equation (1) for s~ = -(1 + eta) x / S."""
    data_variance = 0.3

    def slope(t: float, variance: np.ndarray) -> np.ndarray:
        alpha, sigma, ratio = process.alpha(t), process.sigma(t), process.alpha_dot(t) / process.alpha(t)
        wrong_score = -(1 + score_error) / (alpha**2 * data_variance + sigma**2)
        return 2 * (ratio - sigma * (process.sigma_dot(t) - ratio * sigma) * wrong_score) * variance

    expected = solve_ivp(slope, (TIMES[0], TIMES[-1]), [2.0], t_eval=TIMES, rtol=1e-11, atol=1e-12).y[0]
    variance = perturbed_variance(process, data_variance, score_error, TIMES, initial_variance=2.0)
    np.testing.assert_allclose(variance, expected, rtol=1e-8)


def test_variance_of_several_directions() -> None:
    together = perturbed_variance(GVP(), [0.1, 4.0], 0.2, TIMES)
    each = [perturbed_variance(GVP(), value, 0.2, TIMES) for value in (0.1, 4.0)]
    np.testing.assert_allclose(together, np.stack(each, axis=1), rtol=1e-12)


@by_process
@pytest.mark.parametrize("score_error", [0.0, 0.1])
def test_radius_without_guidance_scales_as_the_variance(process: Process, score_error: float) -> None:
    variance = perturbed_variance(process, 0.3, score_error, TIMES)
    radius = perturbed_radius(process, 0.3, score_error, 0.0, 8, 5.0, TIMES, process.levels(50))
    np.testing.assert_allclose(radius / radius[0], variance / variance[0], rtol=1e-8)
    assert radius[0] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("process", "null_kind"),
    [(Linear(), "velocity"), (GVP(), "noise"), (DDPM(), "score")],
)
def test_radius_with_guidance_is_that_of_the_guided_flow(process: Process, null_kind) -> None:
    """The flow of all coordinates, guided by the mixture's own answers and integrated in the time of the process."""
    score_error, nag_scale, dimension = 0.08, 1.5, 3
    levels, weights = process.levels(12), 1.0 + np.arange(12)
    times = np.array([0.8, 0.6, 0.4])
    with jax.enable_x64(True):
        mixture = make_mixture(process, np.zeros((1, dimension)), covariances=0.4, levels=levels, level_weights=weights)
        # The null branch averages targets of the wrong score: exact targets with the score part scaled.
        offset, _ = process.conversion(levels, "score", null_kind)

        @jax.jit
        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            x, time = x[None], t[None]
            conditional = (1 + score_error) * mixture.posterior_mean(mixture.params, x, time, "score")
            posterior, params = mixture.time_posterior()
            _, node_weights = posterior.quadrature(params, x, 12)
            mean_offset = jnp.sum(node_weights[:, 0] * offset) * x
            null = (1 + score_error) * mixture.marginal_mean(mixture.params, x, null_kind) - score_error * mean_offset
            null = process.convert(null, x, time, null_kind, "score")
            guided = (1 + nag_scale) * conditional - nag_scale * null
            return process.convert(guided, x, time, "score", process.ode_kind)[0]

        start, unknown = np.array([0.9, -0.5, 1.1]), process.ode_time(times)
        back = process.time_of_ratio if process.ode_kind == "noise" else (lambda t: t)
        flow = solve_ivp(
            lambda u, y: np.asarray(velocity(y * process.ode_scale(np.float64(back(u))), jnp.asarray(back(u)))),
            (unknown[0], unknown[-1]),
            start / process.ode_scale(times[0]),
            t_eval=unknown,
            rtol=1e-8,
            atol=1e-9,
        )
    expected = np.sum((flow.y * process.ode_scale(times)) ** 2, axis=0)
    radius = perturbed_radius(
        process, 0.4, score_error, nag_scale, dimension, start @ start, times, levels, weights, null_kind
    )
    np.testing.assert_allclose(radius, expected, rtol=1e-5)
    assert (
        abs(radius[-1] / perturbed_radius(process, 0.4, score_error, 0.0, 3, start @ start, times, levels)[-1] - 1)
        > 0.01
    )


def test_a_start_without_signal_is_refused() -> None:
    with pytest.raises(UserError, match="start below t = 1"):
        perturbed_variance(Linear(), 1.0, 0.1, [1.0, 0.5])
