"""The small interface between a feature net and the metrics computed on its features.

It knows no particular network: a trained classifier (`models.feature_classifier`) and an Inception network
look alike here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from nag_jax.errors import UserError

PIXEL_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A network from images to feature vectors.

    Attributes:
        name: what the features are called in every label, such as "digits-classifier".
        apply: (params, images [B, H, W, C] float32 in [-1, 1]) -> features [B, d]; pure, row by row.
        params: its parameters, a plain nested dict of arrays.
        dimension: d.
        fingerprint: `params_hash(params)`, written beside every number computed with it.
    """

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    dimension: int
    fingerprint: str

    @property
    def distance_label(self) -> str:
        """What a Fréchet distance on these features is called; FID means Inception features only."""
        return f"Fréchet distance on {self.name} features"


def features(feature_net: FeatureNet, images: np.ndarray, batch_size: int = 256) -> NDArray[np.float32]:
    """Features of images, batch by batch, compiled once per image shape and batch size.

    The last batch is filled up with zero images, whose features are thrown away.

    Args:
        feature_net: the network.
        images: [N, H, W, C] float in [-1, 1]; N may be 0.
        batch_size: images per call of the network; changes speed and memory only.

    Returns:
        [N, d] float32 on the host.

    Raises:
        UserError: images of another shape, type or range, or not finite; batch_size below 1.
    """
    if batch_size < 1:
        raise UserError(f"Features: batch_size is {batch_size}; use at least 1.")
    images = np.asarray(images)
    if images.ndim != 4:
        raise UserError(f"Features: images have shape {list(images.shape)}; expected [N, H, W, C].")
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"Features: images are {images.dtype}; expected float32 in [-1, 1] (x / 127.5 - 1).")
    images = images.astype(np.float32, copy=False)
    largest = np.abs(images).max(initial=0.0)
    if not largest <= 1.0 + PIXEL_TOLERANCE:
        raise UserError(f"Features: images reach |x| = {largest}; look for NaN, then clip to [-1, 1].")

    apply = jax.jit(feature_net.apply)
    output = np.empty((len(images), feature_net.dimension), np.float32)
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        batch = np.zeros((batch_size, *images.shape[1:]), np.float32)
        batch[: len(rows)] = rows
        output[start : start + len(rows)] = np.asarray(apply(feature_net.params, batch))[: len(rows)]
    return output
