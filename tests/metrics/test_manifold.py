"""Precision, recall, density and coverage against brute force, with ties, copies and hard scales, and a live peer."""

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.metrics import manifold as manifold_module
from nag_jax.metrics.manifold import density_coverage, manifold, precision_recall, squared_distances


def brute_distances(x, y):
    return np.array([[np.square(a.astype(np.float64) - b).sum() for b in y] for a in x])


def brute_radii(x, k):
    distances = brute_distances(x, x)
    return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(distances)])


def brute_numbers(samples, reference, k):
    to_reference = brute_distances(samples, reference) <= brute_radii(reference, k)
    to_samples = brute_distances(reference, samples) <= brute_radii(samples, k)
    return {
        "precision": to_reference.any(axis=1).mean(),
        "recall": to_samples.any(axis=1).mean(),
        "density": to_reference.sum(axis=1).mean() / k,
        "coverage": to_reference.any(axis=0).mean(),
    }


def our_numbers(samples, reference, k):
    balls = manifold(samples, largest_k=k), manifold(reference, largest_k=k)
    one, other = precision_recall(*balls, k=k), density_coverage(samples, balls[1], k=k)
    return {**vars(one), **vars(other)}


def sets(kind, rng):
    if kind == "continuous":
        return rng.normal(size=(70, 9)).astype(np.float32), rng.normal(size=(90, 9)).astype(np.float32) * 1.2
    if kind == "lattice":  # nearly every distance is tied
        return (rng.integers(0, 3, size=(n, 3)).astype(np.float32) for n in (60, 50))
    if kind == "memorised":  # copies of real vectors lie on the boundary of real balls
        reference = rng.normal(size=(80, 40)).astype(np.float32) + 100
        return np.concatenate([reference[:30], rng.normal(size=(20, 40)).astype(np.float32) + 100]), reference
    if kind == "far":  # |a|^2 + |b|^2 - 2 a.b has no digit left here in float32
        return (1e4 + 1e-1 * rng.normal(size=(n, 16)).astype(np.float32) for n in (40, 50))
    if kind == "huge":
        return (rng.normal(size=(n, 5)).astype(np.float32) * np.float32(1e25) for n in (40, 50))
    if kind == "tiny":
        return (rng.normal(size=(n, 5)).astype(np.float32) * np.float32(1e-25) for n in (40, 50))
    if kind == "clusters":  # a common scale, and neighbours at a millionth of it
        centers = 10.0 * rng.normal(size=(6, 30))
        return (
            (centers[rng.integers(0, 6, n)] + 1e-5 * rng.normal(size=(n, 30))).astype(np.float32) for n in (60, 70)
        )
    return rng.normal(size=(50, 7)), rng.normal(size=(45, 7))  # float64


@pytest.mark.parametrize(
    "kind", ["continuous", "lattice", "memorised", "far", "huge", "tiny", "clusters", "float64"]
)
@pytest.mark.parametrize("k", [1, 3])
def test_numbers_and_radii_are_brute_forces(kind, k):
    samples, reference = sets(kind, np.random.default_rng(k))
    np.testing.assert_allclose(manifold(reference, largest_k=k).squared_radii[:, -1], brute_radii(reference, k))
    assert our_numbers(samples, reference, k) == pytest.approx(brute_numbers(samples, reference, k), abs=1e-12)


def test_one_lattice_by_hand():
    line = np.arange(4.0)[:, None]
    balls = manifold(line, largest_k=3)
    np.testing.assert_array_equal(balls.squared_radii, [[1, 4, 9], [1, 1, 4], [1, 1, 4], [1, 4, 9]])
    samples = np.array([[-3.0], [-3.01], [1.5]])
    # k = 3: balls [-3, 3], [-1, 3], [0, 4], [0, 6]; -3 lies on a boundary, which belongs to its ball.
    assert precision_recall(manifold(samples, largest_k=2), balls, k=2).precision == pytest.approx(1 / 3)
    assert density_coverage(samples, balls, k=3).density == pytest.approx((1 + 0 + 4) / 3 / 3)
    assert density_coverage(samples, balls, k=3).coverage == 1.0
    assert density_coverage(samples[:2], balls, k=3).coverage == 0.25


def test_blocks_do_not_matter(monkeypatch):
    samples, reference = sets("memorised", np.random.default_rng(0))
    whole = our_numbers(samples, reference, 3)
    monkeypatch.setattr(manifold_module, "DISTANCES_PER_DEVICE", 7 * len(reference))
    monkeypatch.setattr(manifold_module, "HOST_ELEMENTS", 100)
    assert our_numbers(samples, reference, 3) == whole


def test_a_set_compared_with_itself():
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    numbers = our_numbers(x, x.copy(), 4)
    # Every ball holds its own vector and its k neighbours, of which the k-th lies exactly on the boundary.
    assert numbers == {"precision": 1.0, "recall": 1.0, "density": 5 / 4, "coverage": 1.0}


def test_sets_that_are_far_apart():
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    assert our_numbers(x, x + 100, 3) == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}


def test_density_of_equal_distributions_is_about_one():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2000, 2)).astype(np.float32)
    numbers = density_coverage(x, manifold(y))
    # Naeem et al.: E[density] = 1, E[coverage] = 1 - (m)_k / (m + n)_k, about 1 - 2^-k.
    assert numbers.density == pytest.approx(1.0, abs=0.05)
    assert numbers.coverage == pytest.approx(1 - 2.0**-5, abs=0.01)


@pytest.mark.parametrize("num_points", [1, 5])
def test_a_collapsed_generator_leaves_few_pairs_to_the_host(num_points, monkeypatch):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(num_points, 64)).astype(np.float32)
    samples = points[rng.integers(0, num_points, 500)]
    computed = []

    def counted(x, y, i, j):
        computed.append(len(i))
        return squared_distances(x, y, i, j)

    monkeypatch.setattr(manifold_module, "squared_distances", counted)
    np.testing.assert_array_equal(manifold(samples).squared_radii, 0.0)
    assert sum(computed) < 5000


def test_float32_decides_nearly_every_pair(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.exponential(size=(2, 300, 256)).astype(np.float32)
    computed = []

    def counted(x, y, i, j):
        computed.append(len(i))
        return squared_distances(x, y, i, j)

    monkeypatch.setattr(manifold_module, "squared_distances", counted)
    our_numbers(x, y, 3)
    assert sum(computed) < 0.05 * 4 * 300 * 300


def test_the_bounds_enclose_the_distance():
    rng = np.random.default_rng(0)
    x, y = (rng.exponential(size=(n, 512)).astype(np.float32) for n in (20, 30))
    low, high = manifold_module._distance_bounds(jnp.asarray(x), jnp.asarray(y))
    exact = brute_distances(x, y)
    assert (np.asarray(low) <= exact).all() and (exact <= np.asarray(high)).all()


def test_errors_name_what_is_wrong():
    x = np.zeros((6, 2), np.float32)
    with pytest.raises(UserError, match="largest_k is 6 for 6 vectors; use 1 to 5"):
        manifold(x, largest_k=6)
    with pytest.raises(UserError, match="k is 5, but radii are known for k = 1 to 3"):
        density_coverage(x, manifold(x, largest_k=3))
    with pytest.raises(UserError, match="3 and 2 dimensions"):
        density_coverage(np.zeros((4, 3)), manifold(x, largest_k=5))
    with pytest.raises(UserError, match="row 1"):
        manifold(np.array([[0.0], [np.nan]]))


@pytest.mark.parity
@pytest.mark.parametrize("in_parts", [False, True])
def test_agrees_with_torch_fidelity(torch_fidelity, in_parts):
    import torch

    rng = np.random.default_rng(3)
    samples, reference = rng.normal(size=(300, 12)) * 0.9, rng.normal(size=(250, 12))
    theirs = torch_fidelity("metric_prc").prc_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(reference),
        prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=in_parts, verbose=False,
    )  # fmt: skip
    ours = precision_recall(manifold(samples), manifold(reference))
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0.1 < ours.recall < 0.95 and 0.1 < ours.precision < 0.99
