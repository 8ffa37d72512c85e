"""The two closed-form shifts: their defining equations, the published numbers, and exact posteriors that agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.analytic import make_mixture
from nag_jax.diffusion.process import DDPM, GVP, Linear
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.noise_shift.answers import answer
from nag_jax.noise_shift.formulas import (
    scale_at_same_snr,
    shift_at_same_noise,
    shift_at_same_noise_first_order,
    shift_at_same_snr,
)

PROCESSES = [Linear(), GVP(), DDPM()]


def test_linear_path_at_error_005():
    t = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(shift_at_same_noise(Linear(), t, 0.05), [0.0118, 0.0025, 0.0014], atol=5e-5)
    np.testing.assert_allclose(shift_at_same_snr(Linear(), t, 0.05), [0.0105, 0.0012, 0.00014], rtol=0.05)
    s = np.sqrt(t**2 + 0.05**2)
    np.testing.assert_allclose(shift_at_same_noise(Linear(), t, 0.05), s - t, rtol=1e-12)
    np.testing.assert_allclose(shift_at_same_snr(Linear(), t, 0.05), s / (1 - t + s) - t, rtol=1e-10)
    np.testing.assert_allclose(scale_at_same_snr(Linear(), t, 0.05), 1 / (1 - t + s), rtol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_definitions(process):
    t, error = np.linspace(0.05, 0.7, 14), 0.03
    noise = np.hypot(process.sigma(t), error)
    np.testing.assert_allclose(process.sigma(t + shift_at_same_noise(process, t, error)), noise, rtol=1e-9)
    same_snr = t + shift_at_same_snr(process, t, error)
    np.testing.assert_allclose(process.sigma(same_snr) / process.alpha(same_snr), noise / process.alpha(t), rtol=1e-9)
    scale = scale_at_same_snr(process, t, error)
    np.testing.assert_allclose(scale * process.alpha(t), process.alpha(same_snr), rtol=1e-9)
    np.testing.assert_allclose(scale * noise, process.sigma(same_snr), rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES[:2], ids=lambda process: process.name)
def test_first_order_error_is_of_second_order_in_the_shift(process):
    errors = np.array([0.04, 0.02])
    exact = shift_at_same_noise(process, 0.5, errors)
    difference = np.abs(shift_at_same_noise_first_order(process, 0.5, errors) - exact)
    # On the linear path the two are the same; elsewhere delta ~ sigma_e^2, so half the error is a sixteenth.
    assert process.name == "linear" and (difference < 1e-15).all() or 12.0 < difference[0] / difference[1] < 20.0


def test_where_no_level_is_so_noisy():
    levels = np.arange(1, 1001) / 1000
    noise = np.hypot(DDPM().sigma(levels), 0.05)
    # One level more than the 231 of the bound: DDPM's last level still holds a little data.
    assert (noise > 1.0).sum() == 231
    has_none = np.isnan(shift_at_same_noise(DDPM(), levels, 0.05))
    np.testing.assert_array_equal(has_none, noise > DDPM().sigma(1.0))
    assert np.isnan(shift_at_same_noise(GVP(), 1.0, 0.05))
    assert np.isnan(shift_at_same_snr(DDPM(), 1.0, 0.05)) and np.isnan(scale_at_same_snr(DDPM(), 1.0, 0.05))
    assert np.isfinite(shift_at_same_noise_first_order(DDPM(), levels, 0.05)).all()
    assert np.isnan(shift_at_same_noise_first_order(GVP(), 1.0, 0.05))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_no_error_no_shift(process):
    t = np.array([0.0, 0.3, 1.0])
    np.testing.assert_allclose(shift_at_same_noise(process, t, 0.0), 0.0, atol=1e-9)
    np.testing.assert_allclose(shift_at_same_snr(process, t, 0.0), 0.0, atol=1e-9)
    np.testing.assert_allclose(scale_at_same_snr(process, t, 0.0), 1.0, atol=1e-9)


def test_pure_noise_keeps_its_level_and_is_scaled():
    assert shift_at_same_snr(Linear(), 1.0, 0.5) == 0.0
    near = scale_at_same_snr(Linear(), 1.0 - 1e-9, 0.5)
    np.testing.assert_allclose(scale_at_same_snr(Linear(), 1.0, 0.5), near, rtol=1e-6)


@pytest.mark.parametrize("process", PROCESSES[:2], ids=lambda process: process.name)
def test_exact_posterior_of_low_dimensional_data_concentrates_at_the_formulas(process):
    dimension, rank, batch, t, error = 1500, 2, 24, 0.4, 0.25
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((1, rank, dimension)) / np.sqrt(dimension)
    mixture = make_mixture(process, np.zeros((1, dimension)), factors=factors, levels=process.levels(300))
    posterior, params = mixture.time_posterior()
    estimator = Estimator(posterior, params)
    x_0 = mixture.sample_data(mixture.params, jax.random.key(1), batch)
    noise, error_noise = rng.standard_normal((2, batch, dimension)).astype(np.float32)
    x = process.add_noise(x_0, noise, jnp.full(batch, t)) + error * error_noise

    ask = jax.jit(lambda x: answer(estimator.posterior, estimator.params, x, 300))
    same_noise = t + shift_at_same_noise(process, t, error)
    same_snr = t + shift_at_same_snr(process, t, error)
    assert abs(same_noise - same_snr) > 0.01
    for states, expected in ((x, same_noise), (scale_at_same_snr(process, t, error) * x, same_snr)):
        answers = ask(states)
        assert float(jnp.sqrt(answers.variance.mean())) < 0.015
        assert abs(float(answers.mean.mean()) - expected) < 0.004
