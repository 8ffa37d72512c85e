"""Kernel densities integrate to one, also of answers that are all the same, and agree with SciPy's."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from nag_jax.noise_shift.density import bandwidth, density_grid, kernel_density

RNG = np.random.default_rng(0)
SETS = {
    "normal": RNG.normal(0.5, 0.1, 500),
    "two peaks": np.concatenate([RNG.normal(0.2, 0.01, 300), RNG.normal(0.8, 0.01, 300)]),
    "all equal": np.full(100, 0.3),
    "nearly all equal": np.append(np.full(99, 0.3), 0.9),
    "one": np.array([0.4]),
    "many": RNG.uniform(size=20000),
}


@pytest.mark.parametrize("name", SETS)
def test_integrates_to_one(name):
    grid = density_grid(SETS[name], SETS["normal"])
    density = kernel_density(SETS[name], grid)
    assert (density >= 0.0).all()
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=2e-3)


def test_matches_scipy_at_the_same_bandwidth():
    answers, grid = SETS["normal"], np.linspace(0.0, 1.0, 200)
    peer = gaussian_kde(answers, bw_method=bandwidth(answers) / answers.std(ddof=1))
    np.testing.assert_allclose(kernel_density(answers, grid), peer(grid), rtol=1e-6, atol=1e-12)


def test_mean_is_kept():
    grid = density_grid(SETS["two peaks"])
    density = kernel_density(SETS["two peaks"], grid)
    np.testing.assert_allclose(np.trapezoid(density * grid, grid), SETS["two peaks"].mean(), atol=2e-3)
