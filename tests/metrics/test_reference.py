"""Reference files: what they hold comes back, from ADM's layout and ours, and damaged ones are named."""

import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.metrics.frechet import Moments, moments
from nag_jax.metrics.reference import image_batches, read_reference, write_reference


def some_moments(d: int, seed: int = 0) -> Moments:
    return moments(np.random.default_rng(seed).normal(size=(50, d)))


def adm_arrays() -> dict[str, np.ndarray]:
    pool, spatial = some_moments(6), some_moments(9, seed=1)
    images = np.random.default_rng(2).integers(0, 256, (11, 4, 4, 3), np.uint8)
    return {
        "arr_0": images, "mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance
    }  # fmt: skip


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adm_files_are_read_as_they_are(tmp_path, save):
    arrays = adm_arrays()
    save(tmp_path / "ref.npz", **arrays)
    reference = read_reference(tmp_path / "ref.npz")
    assert reference.pool.count is None
    np.testing.assert_array_equal(reference.pool.mean, arrays["mu"])
    np.testing.assert_allclose(reference.pool.covariance, arrays["sigma"], rtol=1e-12)
    np.testing.assert_array_equal(reference.spatial.mean, arrays["mu_s"])
    assert reference.image_shape == (11, 4, 4, 3)
    batches = list(image_batches(tmp_path / "ref.npz", 4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(batches), arrays["arr_0"])


def test_statistics_or_images_alone_and_float32(tmp_path):
    arrays = adm_arrays()
    np.savez(tmp_path / "pool.npz", mu=arrays["mu"].astype(np.float32), sigma=arrays["sigma"].astype(np.float32))
    pool = read_reference(tmp_path / "pool.npz")
    assert pool.spatial is None and pool.image_shape is None
    assert pool.pool.mean.dtype == pool.pool.covariance.dtype == np.float64
    np.savez(tmp_path / "images.npz", arrays["arr_0"])
    images = read_reference(tmp_path / "images.npz")
    assert images.pool is None and images.fingerprint is None and images.image_shape == (11, 4, 4, 3)


def test_ours_come_back_and_their_fingerprint_is_of_the_statistics(tmp_path):
    pool, spatial = some_moments(6), some_moments(9, seed=1)
    write_reference(tmp_path / "both.npz", pool, spatial)
    both = read_reference(tmp_path / "both.npz")
    assert both.pool.count == both.spatial.count == 50
    np.testing.assert_allclose(both.spatial.covariance, spatial.covariance, rtol=1e-12)
    np.savez(tmp_path / "adm.npz", **adm_arrays())
    assert read_reference(tmp_path / "adm.npz").fingerprint == both.fingerprint
    write_reference(tmp_path / "other.npz", some_moments(6, seed=5), spatial)
    assert read_reference(tmp_path / "other.npz").fingerprint != both.fingerprint
    with pytest.raises(UserError, match="mu is of 50 images, mu_s of 3"):
        write_reference(tmp_path / "no.npz", pool, Moments(3, spatial.mean, spatial.covariance))


def broken(**changes):
    return {**adm_arrays(), **changes}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros(3)}, "holds features; a reference needs mu and sigma"),
        ({"mu": np.zeros(3)}, "needs both mu and sigma; it holds mu"),
        (broken(sigma_s=np.eye(8)), r"mu_s has shape \[9\], sigma_s \[8, 8\]"),
        (broken(sigma=np.full((6, 6), np.nan)), "sigma: 6 of 6 rows contain NaN"),
        (broken(mu=np.full(6, np.inf)), "mu: 1 of 1 rows contain NaN"),
        (broken(sigma=np.triu(np.ones((6, 6)))), "sigma is not symmetric"),
        (broken(arr_0=np.zeros((2, 4, 4, 3), np.float32)), "arr_0 is float32"),
        (broken(arr_0=np.zeros((4, 4, 3), np.uint8)), r"arr_0 is uint8 of shape \[4, 4, 3\]"),
    ],
)
def test_wrong_contents_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "ref.npz")


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "ref.npz"
    with pytest.raises(UserError, match="does not exist"):
        read_reference(path)
    np.savez(path, **adm_arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or incomplete"):
        read_reference(path)
    place = whole.index(adm_arrays()["mu"].tobytes())
    path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    with pytest.raises(UserError, match="damaged or incomplete.*CRC"):
        read_reference(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="no .npz file"):
        read_reference(tmp_path / "array.npy")
    np.savez(path, mu=np.array([{"a": 1}], object), sigma=np.eye(1))
    with pytest.raises(UserError, match="damaged"):
        read_reference(path)


def test_images_must_be_there(tmp_path):
    write_reference(tmp_path / "ref.npz", some_moments(3))
    with pytest.raises(UserError, match="has no images: it holds mu, sigma, count"):
        next(image_batches(tmp_path / "ref.npz", 4))
    with pytest.raises(UserError, match="batch_size is 0"):
        next(image_batches(tmp_path / "ref.npz", 0))
