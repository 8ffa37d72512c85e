"""The Fréchet distance against closed forms and scipy's sqrtm; its bootstrap against repeated sampling."""

import numpy as np
import pytest
import scipy.linalg

from nag_jax.errors import UserError
from nag_jax.metrics import frechet
from nag_jax.metrics.frechet import Moments, frechet_distance, frechet_distance_from_features, moments


def random_spd(rng: np.random.Generator, d: int) -> np.ndarray:
    a = rng.normal(size=(d, 2 * d))
    return a @ a.T / d


def random_moments(rng: np.random.Generator, d: int) -> Moments:
    return Moments(1000, rng.normal(size=d), random_spd(rng, d))


def test_moments_are_numpys():
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 100
    m = moments(x)
    assert m.count == 50 and m.mean.dtype == m.covariance.dtype == np.float64
    np.testing.assert_allclose(m.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(
        m.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_identical_moments_have_distance_zero():
    rng = np.random.default_rng(1)
    m = random_moments(rng, 40)
    assert frechet_distance(m, m) == pytest.approx(0, abs=1e-10)
    x = rng.normal(size=(200, 20))
    assert frechet_distance_from_features(x, x) == pytest.approx(0, abs=1e-10)


def test_a_shifted_mean_costs_its_square():
    rng = np.random.default_rng(2)
    a = random_moments(rng, 16)
    shift = rng.normal(size=16)
    b = Moments(a.count, a.mean + shift, a.covariance)
    assert frechet_distance(a, b) == pytest.approx(shift @ shift, rel=1e-10)


def test_commuting_covariances_have_the_closed_form():
    rng = np.random.default_rng(3)
    d = 24
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    va, vb = rng.uniform(0, 4, d), rng.uniform(0, 4, d)
    va[:3], vb[2:5] = 0, 0
    a, b = (Moments(10, np.zeros(d), (rotation * v) @ rotation.T) for v in (va, vb))
    assert frechet_distance(a, b) == pytest.approx(((np.sqrt(va) - np.sqrt(vb)) ** 2).sum(), rel=1e-8)


@pytest.mark.parametrize("d", [1, 5, 32])
def test_agrees_with_scipys_matrix_square_root(d):
    rng = np.random.default_rng(d)
    a, b = random_moments(rng, d), random_moments(rng, d)
    root = np.real(scipy.linalg.sqrtm(a.covariance @ b.covariance))
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_symmetric_and_invariant_under_rotation_and_translation():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(80, 12)) * np.linspace(0.1, 3, 12), rng.exponential(size=(60, 12))
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    expected = frechet_distance_from_features(x, y)
    assert frechet_distance_from_features(y, x) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance_from_features(x @ rotation + 7, y @ rotation + 7) == pytest.approx(
        expected, rel=1e-10
    )
    assert frechet_distance_from_features(3 * x, 3 * y) == pytest.approx(9 * expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 90), (90, 20), (2, 2), (49, 50)])
def test_fewer_samples_than_dimensions_equals_the_dense_route(n, m):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(n, 50)), rng.normal(size=(m, 50)) + 0.3
    assert frechet_distance_from_features(x, y) == pytest.approx(
        frechet_distance(moments(x), moments(y)), rel=1e-9
    )


def test_fewer_samples_than_dimensions_in_orthogonal_planes():
    """Sets that vary in orthogonal directions: the root vanishes, the distance is a sum of variances."""
    rng = np.random.default_rng(6)
    x, y = np.zeros((5, 40)), np.zeros((6, 40))
    x[:, :10], y[:, 20:] = rng.normal(size=(5, 10)), rng.normal(size=(6, 20))
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    assert frechet_distance_from_features(x, y) == pytest.approx(expected, rel=1e-12)


def test_errors_name_what_is_wrong():
    x = np.zeros((10, 3))
    broken = x.copy()
    broken[4, 1], broken[7, 0] = np.nan, np.inf
    with pytest.raises(UserError, match="features y: 2 of 10 rows .* row 4"):
        frechet_distance_from_features(x, broken)
    with pytest.raises(UserError, match="3 and 4 dimensions"):
        frechet_distance_from_features(x, np.zeros((10, 4)))
    with pytest.raises(UserError, match="train features: 1 vectors"):
        moments(x[:1], name="train features")
    with pytest.raises(UserError, match=r"\[N, d\]"):
        moments(np.zeros(3))
    good = moments(x)
    with pytest.raises(UserError, match="second moments contain NaN"):
        frechet_distance(good, Moments(10, good.mean, np.full((3, 3), np.nan)))
    with pytest.raises(UserError, match="first moments are of 1"):
        frechet_distance(Moments(1, good.mean, good.covariance), good)
    with pytest.raises(UserError, match="a have 10 rows, b 9"):
        frechet.paired_bootstrap_difference(x, x[:9], x)
    with pytest.raises(UserError, match="num_resamples"):
        frechet.bootstrap_interval(x, x, num_resamples=3)
    with pytest.raises(UserError, match="level"):
        frechet.bootstrap_interval(x, x, level=95)


def test_row_counts_are_resampled_rows():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(30, 4)) + 5
    rows = rng.integers(0, 30, 30)
    weighted = frechet._weighted_moments(x, np.bincount(rows, minlength=30).astype(float))
    copied = moments(x[rows])
    np.testing.assert_allclose(weighted.mean, copied.mean, rtol=1e-12)
    np.testing.assert_allclose(weighted.covariance, copied.covariance, rtol=1e-10, atol=1e-12)


def gaussian_pair(rng: np.random.Generator, scale: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    deviations = np.linspace(0.3, 1, 8)
    return rng.normal(size=(150, 8)) * deviations * scale + shift, rng.normal(size=(120, 8)) * deviations


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.2, 0.3), (1.0, 1.0)])
def test_bootstrap_interval_covers_the_expected_distance(scale, shift):
    """E[D] by 600 fresh pairs; of 80 intervals at 90 %, at least 80 % cover it (all near a true 0)."""
    rng = np.random.default_rng(8)
    expected = np.mean(
        [frechet_distance_from_features(*gaussian_pair(rng, scale, shift)) for _ in range(600)]
    )
    intervals = []
    for trial in range(80):
        x, y = gaussian_pair(rng, scale, shift)
        low, high = frechet.bootstrap_interval(x, y, num_resamples=60, seed=trial, level=0.9)
        assert 0 <= low <= frechet_distance_from_features(x, y) <= high
        intervals.append((low, high))
    lows, highs = np.array(intervals).T
    assert np.mean((lows <= expected) & (expected <= highs)) >= 0.8
    # Wide enough to be honest, narrow enough to be of use: it tells the distance from twice itself.
    assert np.median(highs) < 2 * expected


def test_bootstrap_interval_is_deterministic_and_narrows_with_data():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(2000, 4)) + 1, rng.normal(size=(2000, 4))
    interval = frechet.bootstrap_interval(x, y, num_resamples=50, seed=3)
    assert interval == frechet.bootstrap_interval(x, y, num_resamples=50, seed=3)
    assert interval != frechet.bootstrap_interval(x, y, num_resamples=50, seed=4)
    few = frechet.bootstrap_interval(x[:125], y[:125], num_resamples=50, seed=3)
    assert few[1] - few[0] > 2 * (
        interval[1] - interval[0]
    )  # sixteen times the data: about four times narrower
    wide = frechet.bootstrap_interval(x, y, num_resamples=50, seed=3, level=0.99)
    assert wide[1] - wide[0] >= interval[1] - interval[0]


def test_pairing_narrows_the_difference_of_correlated_methods():
    rng = np.random.default_rng(10)
    shared = rng.normal(size=(400, 6))
    a = shared * 1.1 + 0.3 + 0.05 * rng.normal(size=(400, 6))
    b = shared * 1.1 + 0.35 + 0.05 * rng.normal(size=(400, 6))
    reference = rng.normal(size=(300, 6))
    paired = frechet.paired_bootstrap_difference(a, b, reference, num_resamples=100)
    unpaired = frechet.paired_bootstrap_difference(a, b[::-1], reference, num_resamples=100)
    assert paired[1] - paired[0] < 0.5 * (unpaired[1] - unpaired[0])
    assert paired[1] < 0  # a is closer, and pairing shows it
    swapped = frechet.paired_bootstrap_difference(b, a, reference, num_resamples=100)
    np.testing.assert_allclose(swapped, (-paired[1], -paired[0]), atol=1e-9)
    assert frechet.paired_bootstrap_difference(a, a, reference, num_resamples=20) == (0.0, 0.0)


def test_one_reference_serves_many_sets():
    rng = np.random.default_rng(11)
    reference = random_moments(rng, 30)
    distance_to = frechet.DistanceTo(reference)
    for n in (2, 10, 29, 30, 80):
        x = rng.normal(size=(n, 30)) + 1
        expected = frechet_distance(reference, moments(x))
        assert distance_to.of_moments(moments(x)) == pytest.approx(expected, rel=1e-9)
        assert distance_to.of_features(x) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError, match="30 and 4 dimensions"):
        distance_to.of_features(np.zeros((5, 4)))


def test_a_reference_may_not_know_its_count():
    m = random_moments(np.random.default_rng(12), 5)
    unknown = Moments(None, m.mean, m.covariance)
    assert frechet_distance(unknown, m) == pytest.approx(0, abs=1e-12)


def hard_covariance(rng: np.random.Generator, d: int, smallest: float) -> np.ndarray:
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    covariance = (rotation * np.geomspace(1, smallest, d)) @ rotation.T
    return 0.5 * (covariance + covariance.T)


@pytest.mark.parametrize(("smallest", "bound"), [(1e-4, 1e-11), (1e-12, 1e-5)])
def test_equal_covariances_with_tiny_eigenvalues_cost_nothing_on_either_side(smallest, bound):
    """A known gap of the means keeps the result off 0, so that an error below would show as well."""
    rng, d = np.random.default_rng(13), 200
    covariance = hard_covariance(rng, d, smallest)
    a = Moments(1000, np.zeros(d), covariance)
    b = Moments(1000, np.full(d, 0.1), covariance)
    assert frechet_distance(a, b) == pytest.approx(0.01 * d, abs=bound)
    assert 0 <= frechet_distance(a, a) <= bound


def test_a_covariance_rounded_to_float32_is_read_within_its_rounding():
    rng, d = np.random.default_rng(14), 150
    exact = hard_covariance(rng, d, 1e-12)
    rounded = exact.astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(rounded)[0] < 0  # no covariance any more, strictly
    a, b = (Moments(1000, np.zeros(d), covariance) for covariance in (exact, rounded))
    allowed = 4 * d * np.linalg.norm(rounded - exact, 2)
    for distance in (frechet_distance(a, b), frechet_distance(b, a), frechet_distance(b, b)):
        assert 0 <= distance < allowed
    shifted = Moments(1000, np.ones(d), rounded)
    assert frechet_distance(b, shifted) == pytest.approx(d, abs=allowed)


def test_a_matrix_that_is_no_covariance_is_refused():
    m = Moments(10, np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(UserError, match="eigenvalue -1.*no covariance"):
        frechet_distance(m, m)


def test_two_vectors_and_constant_features():
    x, y = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), np.array([[1.0, 3.0, 0.0], [1.0, 5.0, 0.0]])
    # Variances of 2 along different axes: nothing is shared. The means differ by (0, 4, 0).
    assert frechet_distance_from_features(x, y) == pytest.approx(16 + 2 + 2)
    constant = np.full((20, 3), 0.1)
    assert frechet_distance_from_features(constant, constant) == pytest.approx(0, abs=1e-15)
    assert frechet_distance_from_features(constant, constant + 1) == pytest.approx(3)


@pytest.mark.parity
def test_agrees_with_torch_fidelity(torch_fidelity):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(15)
    x, y = rng.exponential(size=(400, 24)), rng.normal(size=(300, 24))
    fid = torch_fidelity("metric_fid")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
    theirs = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance_from_features(x, y) == pytest.approx(theirs, rel=1e-9)
