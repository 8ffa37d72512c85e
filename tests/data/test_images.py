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


def encode(picture: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def test_sixteen_bits_keep_their_upper_eight():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode_image(encode(Image.fromarray(values), "png"))
    np.testing.assert_array_equal(pixels[..., 0], values // 256)


def test_palette_and_transparency_become_the_colours_that_are_seen():
    image = random_image(6, 7)
    image[:] = image // 64 * 64  # 64 colours: a palette holds them all
    palette = Image.fromarray(image).quantize(64, method=Image.Quantize.FASTOCTREE)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encode(palette, "png")), expected)
    opaque_or_not = np.concatenate([image, random_image(6, 7, 1)], axis=2)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(opaque_or_not), "png")), image)


def test_cmyk_jpeg_becomes_rgb():
    # Ink at full strength leaves none of its complement: cyan no red, magenta no green, yellow no blue.
    inks = np.zeros((16, 64, 4), np.uint8)
    for place in range(3):
        inks[:, 16 * place : 16 * place + 16, place] = 255
    inks[:, 48:, 3] = 255
    pixels = decode_image(encode(Image.fromarray(inks, mode="CMYK"), "jpeg", quality=100))
    expected = np.array([[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]])
    assert pixels.shape == (16, 64, 3)
    np.testing.assert_allclose(pixels[8, 8::16].astype(int), expected, atol=6)


def test_grey_and_bilevel_images():
    assert decode_image(encode(Image.fromarray(random_image(5, 4, 1)[..., 0]), "jpeg")).shape == (5, 4, 1)
    bilevel = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_image(encode(bilevel, "png"))[..., 0], [[0, 255], [255, 0]])


def test_images_that_cannot_be_read_are_refused_and_not_guessed():
    whole = encode(Image.fromarray(random_image(64, 64)), "jpeg")
    with pytest.raises(OSError, match="truncated"):
        decode_image(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="32 bits"):
        decode_image(encode(Image.fromarray(np.ones((2, 2), np.float32)), "tiff"))
