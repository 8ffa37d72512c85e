"""Answers of exact and Gaussian posteriors, and their collection on forward states."""

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.analytic import make_mixture
from nag_jax.diffusion.process import Linear
from nag_jax.diffusion.time_posterior import Estimator, GaussianTimePosterior
from nag_jax.errors import UserError
from nag_jax.noise_shift.answers import AnswerObserver, answer, forward_answers


def mean_of_state(params, x):
    return params["scale"] * x.mean(axis=-1), jnp.log(0.25) * jnp.ones(x.shape[0])


GAUSSIAN = GaussianTimePosterior(mean_of_state)


def test_gaussian_answers_are_its_own_moments():
    x = jnp.array([[1.0, 3.0], [-4.0, 0.0]])
    mean, variance = AnswerObserver(GAUSSIAN)({"scale": 2.0}, x, jnp.zeros(2))
    np.testing.assert_allclose(mean, [4.0, -4.0])
    np.testing.assert_allclose(variance, 0.25, rtol=1e-6)
    assert hash(AnswerObserver(GAUSSIAN)) == hash(AnswerObserver(GAUSSIAN))


def test_exact_posterior_answers_against_bayes_rule():
    levels = np.linspace(0.05, 1.0, 12)
    posterior, params = make_mixture(Linear(), np.zeros((1, 3)), covariances=0.5, levels=levels).time_posterior()
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    variance = (1 - levels) ** 2 * 0.5 + levels**2
    log_weights = -0.5 * (x**2).sum(1)[:, None] / variance - 1.5 * np.log(variance)
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    expected = weights @ levels
    actual = answer(posterior, params, jnp.asarray(x), num_nodes=12)
    np.testing.assert_allclose(actual.mean, expected, rtol=1e-4)
    np.testing.assert_allclose(actual.variance, weights @ levels**2 - expected**2, rtol=1e-3)


def test_forward_answers_do_not_depend_on_batches():
    images = np.random.default_rng(0).standard_normal((10, 6)).astype(np.float32)
    estimator, times = Estimator(GAUSSIAN, {"scale": jnp.float32(1.0)}), np.array([0.0, 0.3, 1.0])
    whole = forward_answers(estimator, Linear(), images, times, seed=3)
    cut = forward_answers(estimator, Linear(), images, times, seed=3, batch_size=4)
    assert whole.mean.shape == whole.variance.shape == (3, 10)
    np.testing.assert_allclose(whole.mean, cut.mean, atol=1e-6)
    np.testing.assert_allclose(whole.mean[0], images.mean(axis=1), atol=1e-6)
    # One image has one noise at all times, and another one in another stream or with another seed.
    np.testing.assert_allclose(whole.mean[1], 0.7 * whole.mean[0] + 0.3 * whole.mean[2], atol=1e-6)
    for other in (
        forward_answers(estimator, Linear(), images, times, seed=4),
        forward_answers(estimator, Linear(), images, times, seed=3, stream="another"),
    ):
        assert np.abs(other.mean[2] - whole.mean[2]).min() > 1e-4


def test_nothing_to_ask():
    estimator = Estimator(GAUSSIAN, {"scale": jnp.float32(1.0)})
    with pytest.raises(UserError, match="0 images"):
        forward_answers(estimator, Linear(), np.zeros((0, 6)), np.array([0.5]), seed=0)


def test_forward_noise_is_standard_normal():
    estimator = Estimator(GAUSSIAN, {"scale": jnp.float32(1.0)})
    means = forward_answers(estimator, Linear(), np.zeros((4000, 4)), np.array([1.0]), seed=0).mean
    assert abs(means.mean()) < 4 * 0.5 / np.sqrt(4000) and abs(means.std() - 0.5) < 0.03
