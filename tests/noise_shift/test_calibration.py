"""The calibration's inverse, on curves whose inverse is known and on curves that have none."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.process import Linear
from nag_jax.diffusion.time_posterior import Estimator, GaussianTimePosterior
from nag_jax.errors import UserError
from nag_jax.noise_shift.calibration import Calibration, calibrate

TIMES = tuple(np.linspace(0.1, 0.9, 9).tolist())


def calibration(means) -> Calibration:
    return Calibration(TIMES, tuple(float(mean) for mean in means), (0.1,) * 9)


def test_inverse_of_a_shrinking_estimator():
    shrinking = calibration(0.2 + 0.5 * np.array(TIMES))
    t = np.array([[0.1, 0.33], [0.9, 0.5]])
    np.testing.assert_allclose(shrinking.level(0.2 + 0.5 * t), t, atol=1e-12)
    # Beyond the ends it goes on with the last slope, as far as a level can be.
    np.testing.assert_allclose(shrinking.level(np.array([0.225, 0.675, 0.0, 2.0])), [0.05, 0.95, 0.0, 1.0], atol=1e-12)


def test_inverse_of_a_curved_estimator_at_its_knots():
    curved = calibration(np.array(TIMES) ** 2)
    np.testing.assert_allclose(curved.level(np.array(curved.means)), TIMES, atol=1e-12)
    assert np.all(np.diff(curved.level(np.linspace(0.0, 1.0, 101))) >= 0.0)


def test_a_dip_is_pooled_and_the_inverse_still_rises():
    means = np.array(TIMES)
    means[3], means[4] = means[4], means[3]
    dipped = calibration(means)
    pooled = 0.5 * (means[3] + means[4])
    np.testing.assert_allclose(dipped.level(np.array([pooled])), 0.5 * (TIMES[3] + TIMES[4]))
    answers = np.linspace(0.1, 0.9, 401)
    assert np.all(np.diff(dipped.level(answers)) > 0.0)


def test_an_estimator_that_tells_nothing():
    assert np.isnan(calibration(np.linspace(0.6, 0.4, 9)).level(np.array([0.5]))).all()


def test_json_round_trip():
    curved = calibration(np.array(TIMES) ** 2)
    assert Calibration.from_json(json.loads(json.dumps(curved.to_json()))) == curved


@pytest.mark.parametrize("times", [(0.5,), (0.5, 0.5), (0.7, 0.5)])
def test_impossible_times(times):
    with pytest.raises(UserError):
        Calibration(times, (0.1,) * len(times), (0.1,) * len(times))


def test_calibrate_measures_the_mean_answer():
    # |x|^2 / d of pure noise at level t is t^2 on average, and the image's own noise scales it exactly.
    posterior = GaussianTimePosterior(lambda params, x: (jnp.square(x).mean(axis=-1), jnp.zeros(x.shape[0])))
    images = np.zeros((400, 50), np.float32)
    measured = calibrate(Estimator(posterior, {}), Linear(), images, seed=1)
    times, means = np.array(measured.times), np.array(measured.means)
    np.testing.assert_allclose(means / times**2, means[0] / times[0] ** 2, rtol=1e-4)
    np.testing.assert_allclose(means, times**2, rtol=4 * np.sqrt(2 / 50 / 400))
    np.testing.assert_allclose(np.array(measured.deviations) / times**2, np.sqrt(2 / 50), rtol=0.15)
