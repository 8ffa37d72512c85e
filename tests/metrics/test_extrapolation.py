"""The distance over the sample count: its line, and a limit nearer to the population's distance."""

import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.metrics.extrapolation import default_sizes, distance_curve
from nag_jax.metrics.frechet import DistanceTo, Moments, frechet_distance_from_features, moments

DIMENSION = 10
UNIT = Moments(None, np.zeros(DIMENSION), np.eye(DIMENSION))


def test_sizes():
    assert default_sizes(50_000)[0] == 5_000 and default_sizes(50_000)[-1] == 50_000
    assert len(default_sizes(50_000)) == 15
    assert np.ptp(np.diff(default_sizes(50_000))) <= 1  # evenly spaced
    assert default_sizes(4) == [2, 3, 4]


def test_the_limit_removes_the_bias_of_few_samples():
    """40 sets drawn from the reference itself, at a true distance of 0: on average the limit is nearer to it."""
    rng, limits, values = np.random.default_rng(0), [], []
    for _ in range(40):
        curve = distance_curve(rng.normal(size=(1000, DIMENSION)), UNIT)
        limits.append(curve.limit)
        values.append(curve.distances[-1])
    assert np.mean(values) > 0.01
    assert abs(np.mean(limits)) < 0.3 * np.mean(values)


def test_the_slope_is_the_known_bias():
    """In one dimension, of n values of N(0, 1): E[D] = E[mean^2] + E[(s - 1)^2] = (1 + 1/2) / n to first order."""
    rng = np.random.default_rng(1)
    one = Moments(None, np.zeros(1), np.eye(1))
    slopes = [distance_curve(rng.normal(size=(400, 1)), one, sizes=range(40, 401, 10)).slope for _ in range(300)]
    assert np.mean(slopes) == pytest.approx(1.5, abs=0.35)


def test_the_line_is_the_least_squares_line_of_its_points():
    x = np.random.default_rng(2).exponential(size=(300, DIMENSION))
    curve = distance_curve(x, DistanceTo(UNIT), sizes=[300, 50, 100, 50])
    assert curve.sizes.tolist() == [50, 100, 300]
    assert curve.distances[-1] == pytest.approx(DistanceTo(UNIT).of_features(x))
    residuals = curve.distances - curve.limit - curve.slope / curve.sizes
    assert residuals.sum() == pytest.approx(0, abs=1e-9)
    assert (residuals / curve.sizes).sum() == pytest.approx(0, abs=1e-9)
    assert np.abs(residuals).max() == pytest.approx(curve.largest_residual)
    again = distance_curve(x, UNIT, sizes=[50, 100, 300])
    np.testing.assert_array_equal(curve.distances, again.distances)
    assert (distance_curve(x, UNIT, sizes=[50, 100, 300], seed=1).distances[:2] != curve.distances[:2]).all()


def test_fewer_samples_than_dimensions():
    rng = np.random.default_rng(3)
    x, reference = rng.normal(size=(30, 50)), rng.normal(size=(200, 50))
    curve = distance_curve(x, moments(reference), sizes=[10, 30])
    assert curve.distances[-1] == pytest.approx(frechet_distance_from_features(x, reference), rel=1e-9)


@pytest.mark.parametrize("sizes", [[100], [1, 50], [50, 101], []])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="at least two different sizes"):
        distance_curve(np.random.default_rng(0).normal(size=(100, DIMENSION)), UNIT, sizes=sizes)
