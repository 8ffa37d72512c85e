"""TensorFlow 1's resize against its definition and torch-fidelity's, and the bytes that samples are judged as."""

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.data.images import to_float, to_uint8
from nag_jax.errors import UserError
from nag_jax.metrics.resize import resize_bilinear_tf1, to_pixels


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.float32)


def test_resize_follows_its_definition_pixel_by_pixel():
    image = pixels(5, 3)
    result = np.asarray(resize_bilinear_tf1(jnp.asarray(image), 7, 8))
    for i in range(7):
        for j in range(8):
            y, x = i * 5 / 7, j * 3 / 8
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 2)
            above = image[:, top, left] * (1 - x + left) + image[:, top, right] * (x - left)
            below = image[:, bottom, left] * (1 - x + left) + image[:, bottom, right] * (x - left)
            np.testing.assert_allclose(result[:, i, j], above * (1 - y + top) + below * (y - top), rtol=1e-5, atol=1e-4)


def test_the_same_size_changes_nothing_and_halving_takes_every_second_pixel():
    image = jnp.asarray(pixels(6, 8))
    np.testing.assert_array_equal(resize_bilinear_tf1(image, 6, 8), image)
    np.testing.assert_array_equal(resize_bilinear_tf1(image, 3, 4), image[:, ::2, ::2])


@pytest.mark.parity
@pytest.mark.parametrize("size", [(32, 32), (256, 256), (299, 299), (64, 400), (512, 37), (1, 1)])
def test_resize_is_torch_fidelitys(import_peer, size):
    torch = pytest.importorskip("torch")
    peer = import_peer("torch_fidelity.interpolate_compat_tensorflow")
    image = pixels(*size)
    expected = peer.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(image.transpose(0, 3, 1, 2)), size=(299, 299), align_corners=False
    )
    actual = np.asarray(resize_bilinear_tf1(jnp.asarray(image), 299, 299)).transpose(0, 3, 1, 2)
    assert np.abs(actual - expected.numpy()).max() <= 1e-5 * image.max()


def test_every_byte_comes_back_and_other_values_are_rounded_as_saved_samples_are():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(to_pixels(jnp.asarray(to_float(every))), every.astype(np.float32))
    images = np.random.default_rng(0).uniform(-1.1, 1.1, (2, 50, 50, 3)).astype(np.float32)
    np.testing.assert_array_equal(to_pixels(jnp.asarray(images)), to_uint8(images).astype(np.float32))


def test_grey_images_are_refused():
    with pytest.raises(UserError, match=r"\[2, 8, 8, 1\].*Repeat"):
        to_pixels(jnp.zeros((2, 8, 8, 1)))
