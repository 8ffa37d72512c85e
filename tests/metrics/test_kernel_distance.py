"""The kernel distance against its definition, its expected value, and a live peer on the same subsets."""

import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.metrics import kernel_distance as module
from nag_jax.metrics.kernel_distance import full_kernel_distance, kernel_distance


def by_definition(x, y):
    """Gretton et al. (2012), eq. (3), pair by pair."""

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("block_rows", [3, 2048])
def test_all_pairs_in_blocks_are_the_definition(block_rows, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 4)), rng.exponential(size=(13, 4))
    assert full_kernel_distance(x, y) == pytest.approx(by_definition(x, y), rel=1e-12)
    assert full_kernel_distance(y, x) == pytest.approx(full_kernel_distance(x, y), rel=1e-12)


def test_whole_subsets_are_the_full_estimate():
    x, y = np.random.default_rng(1).normal(size=(2, 40, 5)).astype(np.float32)
    result = kernel_distance(x, y, subset_size=40, num_subsets=3)
    np.testing.assert_allclose(result.distances, full_kernel_distance(x, y), rtol=1e-9)
    assert result.std == pytest.approx(0.0, abs=1e-12)


def test_it_is_unbiased():
    """Of one dimension and N(m, 1): E k(x, y) = sum over powers (x y)^i, and x y has known moments."""
    rng = np.random.default_rng(2)

    def moment(mean, power):
        return {0: 1.0, 1: mean, 2: mean**2 + 1, 3: mean**3 + 3 * mean}[power]

    def expected_kernel(a, b):
        return sum(c * moment(a, i) * moment(b, i) for i, c in enumerate((1, 3, 3, 1)))

    truth = expected_kernel(0, 0) + expected_kernel(1, 1) - 2 * expected_kernel(0, 1)
    estimates = [
        full_kernel_distance(rng.normal(size=(6, 1)), 1 + rng.normal(size=(6, 1))) for _ in range(4000)
    ]
    assert np.mean(estimates) == pytest.approx(truth, abs=4 * np.std(estimates) / np.sqrt(4000))
    same = [full_kernel_distance(*rng.normal(size=(2, 6, 1))) for _ in range(4000)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(4000)
    assert min(same) < 0  # an unbiased estimate of 0


def test_subsets_follow_the_seed_and_scatter_about_the_full_estimate():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(300, 6)), rng.normal(size=(400, 6)) + 0.5
    one, same, other = (kernel_distance(x, y, subset_size=50, num_subsets=60, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.distances, same.distances)
    assert one.mean != other.mean
    assert one.mean == pytest.approx(full_kernel_distance(x, y), abs=4 * one.std / np.sqrt(60))


def test_errors_name_what_is_wrong():
    x = np.zeros((10, 3))
    with pytest.raises(UserError, match="100 subsets of 1000 of 10 and 10 vectors.*2 to 10"):
        kernel_distance(x, x)
    with pytest.raises(UserError, match="3 and 2 dimensions"):
        full_kernel_distance(x, x[:, :2])
    with pytest.raises(UserError, match="y: 1 vectors"):
        full_kernel_distance(x, x[:1])


@pytest.mark.parity
def test_agrees_with_torch_fidelity_on_the_same_subsets(torch_fidelity):
    import torch

    rng = np.random.default_rng(4)
    x, y = rng.exponential(size=(120, 16)), rng.normal(size=(150, 16))
    theirs = torch_fidelity("metric_kid").kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=5, kid_subset_size=50, rng_seed=7, verbose=False
    )
    draws = np.random.RandomState(7)
    ours = [
        full_kernel_distance(x[draws.choice(120, 50, replace=False)], y[draws.choice(150, 50, replace=False)])
        for _ in range(5)
    ]
    assert np.mean(ours) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert np.std(ours) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-8)
