"""The reflected interval: where it lies, and that it undoes the bias that an ordinary one doubles."""

import numpy as np

from nag_jax.metrics.bootstrap import reflected_ends


def test_a_symmetric_distribution_gives_the_percentiles():
    resampled = 3.0 + np.linspace(-1.0, 1.0, 2001)
    low, high = reflected_ends(3.0, resampled, level=0.9)
    np.testing.assert_allclose([low, high], [2.1, 3.9])


def test_bias_and_skew_are_mirrored():
    estimate, resampled = 1.0, np.array([1.0, 1.0, 1.0, 5.0])
    low, high = reflected_ends(estimate, resampled, level=1.0 - 1e-12)
    # S + mean(S*) is 3; the largest S* is 2 above that, the smallest 2 below, and they change sides.
    np.testing.assert_allclose([low, high], [-2.0, 2.0], atol=1e-9)


def test_columns_are_intervals_of_their_own():
    rng = np.random.default_rng(0)
    estimate, resampled = rng.standard_normal(3), rng.standard_normal((200, 3))
    together = reflected_ends(estimate, resampled, level=0.8)
    alone = [reflected_ends(estimate[i], resampled[:, i], level=0.8) for i in range(3)]
    np.testing.assert_allclose(together, np.transpose(alone))


def test_a_size_s_expected_value_is_covered_where_percentiles_lie_above_it():
    rng, num_trials, dimension = np.random.default_rng(1), 300, 20
    estimates, ends, percentiles = [], [], []
    for _ in range(num_trials):
        x = rng.standard_normal((50, dimension))
        resampled = [np.square(x[rng.integers(50, size=50)].mean(axis=0)).sum() for _ in range(100)]
        estimates.append(np.square(x.mean(axis=0)).sum())
        ends.append(reflected_ends(estimates[-1], resampled, level=0.95))
        percentiles.append(np.quantile(resampled, [0.025, 0.975]))
    expected = dimension / 50

    def share(intervals):
        return np.mean([low <= expected <= high for low, high in intervals])

    assert share(ends) > 0.92 > 0.8 > share(percentiles)
