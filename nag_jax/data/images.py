"""From a stored image to what a network sees, and back to bytes: decoding, channels, crop, range."""

import io
from typing import Any

import numpy as np
from PIL import Image


def decode_image(encoded: bytes) -> np.ndarray:
    """Decode PNG, JPEG or whatever else Pillow reads.

    Args:
      encoded: the file's bytes.

    Returns:
      uint8 [H, W, 1] for grey images of 8 or 16 bits, otherwise [H, W, 3] in RGB (transparency is dropped). Of 16 bits
      the upper 8 are kept.

    Raises:
      ValueError: pixels of 32 bits.
      OSError: no image, or a damaged one (Pillow raises others too).
    """
    with Image.open(io.BytesIO(encoded)) as opened:
        if opened.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            pixels = (np.asarray(opened) >> 8).astype(np.uint8)
        elif opened.mode in ("I", "F"):
            raise ValueError("pixels have 32 bits; only 8 and 16 are read")
        else:
            pixels = np.asarray(opened if opened.mode in ("L", "RGB") else opened.convert("RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def preprocess(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Convert the channels, then centre-crop.

    Args:
      image: uint8 [H, W, 1] or [H, W, 3].
      size: side of the result in pixels.
      channels: 1 (grey, ITU-R 601 luma) or 3 (RGB).

    Returns:
      uint8 [size, size, channels].
    """
    if image.shape == (size, size, channels):
        return image
    picture = _to_pillow(image).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(_center_crop(picture, size))
    return pixels[:, :, None] if channels == 1 else pixels


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop, behind the published ImageNet numbers (Dhariwal and Nichol 2021, its image loader).

    The image is halved by box averaging while its shorter side is at least twice `size`, then resized by a
    bicubic filter so that the shorter side is `size`, then cropped in the middle. Small images are enlarged.

    Args:
      image: uint8 [H, W, 1] or [H, W, 3].
      size: side of the result in pixels.

    Returns:
      uint8 [size, size, C].
    """
    pixels = np.asarray(_center_crop(_to_pillow(image), size))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def to_float(image: Any) -> Any:
    """uint8 0..255 of NumPy or JAX to float32 in [-1, 1]: u / 127.5 - 1."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _center_crop(picture: Image.Image, size: int) -> Image.Image:
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_uint8(images: Any) -> Any:
    """Images in [-1, 1] as bytes, the inverse of `to_float` for bytes.

    Args:
      images: float, any shape, of NumPy or JAX; values beyond [-1, 1] are clipped.

    Returns:
      uint8, same shape, rounded to nearest.
    """
    namespace = images.__array_namespace__()
    return namespace.clip(namespace.round((images + 1.0) * 127.5), 0, 255).astype(np.uint8)
