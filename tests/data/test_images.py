"""Crop, channels and range against their definitions."""

import io

import numpy as np
import pytest
from PIL import Image

from nag_jax.data.images import center_crop, decode_image, preprocess, to_float


def random_image(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(7, 5), (16, 16), (31, 17), (32, 33), (65, 40), (200, 131)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_square_at_any_size(height: int, width: int, channels: int):
    cropped = center_crop(random_image(height, width, channels), 16)
    assert cropped.shape == (16, 16, channels) and cropped.dtype == np.uint8


def test_crop_of_the_right_height_only_cuts():
    image = random_image(16, 25)
    np.testing.assert_array_equal(center_crop(image, 16), image[:, 4:20])
    image = random_image(26, 16)
    np.testing.assert_array_equal(center_crop(image, 16), image[5:21])


def test_crop_of_twice_the_size_is_the_mean_of_each_four_pixels():
    image = random_image(32, 32)
    means = image.reshape(16, 2, 16, 2, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(center_crop(image, 16) - means).max() <= 1  # Pillow rounds after each axis


def test_crop_halves_until_less_than_twice_the_size_then_resizes_bicubically():
    image = random_image(90, 71)
    picture = Image.fromarray(image)
    for size in ((35, 45), (17, 22)):
        picture = picture.resize(size, Image.Resampling.BOX)
    picture = picture.resize((10, 13), Image.Resampling.BICUBIC)  # 17 < 2 * 10, and 22 * 10 / 17 = 12.9
    expected = np.asarray(picture)[1:11]
    np.testing.assert_array_equal(center_crop(image, 10), expected)


def test_crop_enlarges_small_images():
    picture = Image.fromarray(random_image(5, 6))
    enlarged = np.asarray(picture.resize((10, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(random_image(5, 6), 8), enlarged[:, 1:9])


def test_a_flat_image_stays_flat():
    image = np.full((45, 71, 3), 77, np.uint8)
    np.testing.assert_array_equal(preprocess(image, 16, 3), np.full((16, 16, 3), 77))


def test_channels():
    grey = random_image(8, 8, 1)
    np.testing.assert_array_equal(preprocess(grey, 8, 3), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(preprocess(grey, 8, 1), grey)
    colour = random_image(8, 8, 3)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(preprocess(colour, 8, 1)[..., 0] - luma).max() <= 1


def test_range_has_exact_ends_and_steps():
    levels = to_float(np.arange(256, dtype=np.uint8))
    assert levels.dtype == np.float32 and levels[0] == -1 and levels[255] == 1
    np.testing.assert_array_equal(np.rint((levels + 1) * 127.5), np.arange(256))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 3), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_decode_gives_grey_or_rgb(mode: str, channels: int):
    image = Image.fromarray(random_image(6, 5)).convert(mode)
    file = io.BytesIO()
    image.save(file, format="png")
    decoded = decode_image(file.getvalue())
    assert decoded.shape == (6, 5, channels) and decoded.dtype == np.uint8
    expected = np.asarray(image if mode == "L" else image.convert("RGB")).reshape(decoded.shape)
    np.testing.assert_array_equal(decoded, expected)
