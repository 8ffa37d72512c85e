"""From images in [-1, 1] to what feature nets of photographs take: whole pixels, and TensorFlow 1's resize.

What a network does with them afterwards (its mean and scale) stands beside the network.
"""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from nag_jax.errors import UserError


def to_pixels(images: jax.Array) -> jax.Array:
    """Images as the bytes that `data.images.to_uint8` makes of them, in float32.

    Samples are judged as the 8-bit files that they would be saved as, which is how the published numbers were made; an
    image that was bytes comes back exactly.

    Args:
        images: [B, H, W, 3] float32 in [-1, 1]; values beyond are clipped.

    Returns:
        [B, H, W, 3] float32, whole numbers 0..255.

    Raises:
        UserError: images of another shape, such as grey ones.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"Feature net: images have shape {list(images.shape)}; expected RGB, [B, H, W, 3]. Repeat a grey channel "
            "three times."
        )
    return jnp.clip(jnp.round((images.astype(jnp.float32) + 1.0) * 127.5), 0.0, 255.0)


def resize_bilinear_tf1(images: jax.Array, height: int, width: int) -> jax.Array:
    """TensorFlow 1's `tf.image.resize_bilinear(images, [height, width], align_corners=False)`.

    Pixel i of the result is taken at i * in / out of the image: neither half-pixel centers nor a filter against
    aliasing, and past the last pixel that pixel. Source: tensorflow/core/kernels/image/resize_bilinear_op.cc and
    tensorflow/core/util/image_resizer_state.h (the "legacy" scaler), in float32 as there.

    Args:
        images: [B, H, W, C] float32.
        height, width: of the result in pixels.

    Returns:
        [B, height, width, C] float32.
    """
    top, bottom, down = _neighbours(images.shape[1], height)
    left, right, across = _neighbours(images.shape[2], width)
    at_left, at_right = jnp.take(images, left, axis=2), jnp.take(images, right, axis=2)
    rows = at_left + (at_right - at_left) * across[:, None]
    above, below = jnp.take(rows, top, axis=1), jnp.take(rows, bottom, axis=1)
    return above + (below - above) * down[:, None, None]


def _neighbours(old: int, new: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """For every new pixel along an axis, the old one at or before its place, the next one, and the way between."""
    place = np.arange(new, dtype=np.float32) * np.float32(old / new)
    before = np.minimum(place.astype(np.int32), old - 1)
    return before, np.minimum(before + 1, old - 1), place - before.astype(np.float32)
