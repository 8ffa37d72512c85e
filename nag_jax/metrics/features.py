"""The small interface between a feature net and the metrics computed on its features.

It knows no particular network: a trained classifier (`models.feature_classifier`) and an Inception network
look alike here.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from nag_jax.data.images import to_float
from nag_jax.errors import UserError
from nag_jax.parallel import local_sharding

PIXEL_TOLERANCE = 1e-3
FID_NETWORK = "inception-2015-12-05"  # the one network whose distances are called FID


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A network from images to feature vectors.

    Attributes:
        name: what the features are called in every label, such as "digits-classifier".
        apply: (params, images [B, H, W, C] float32 in [-1, 1]) -> features [B, d]; pure, row by row.
        params: its parameters, a plain nested dict of arrays.
        dimension: d.
        fingerprint: `params_hash(params)`, written beside every number computed with it.
        taps: name and width of what else the network answers, such as class scores; none for most networks.
        apply_taps: (params, images as for `apply`) -> {tap: [B, width]}, all of `taps`; None without taps.
    """

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    dimension: int
    fingerprint: str
    taps: Mapping[str, int] = field(default_factory=dict)
    apply_taps: Callable[[Any, jax.Array], dict[str, jax.Array]] | None = None

    @property
    def distance_label(self) -> str:
        """What a Fréchet distance on these features is called; FID means Inception features only."""
        return "FID" if self.name == FID_NETWORK else f"Fréchet distance on {self.name} features"


def from_function(
    name: str, function: Callable[[jax.Array], jax.Array], dimension: int, *, fingerprint: str
) -> FeatureNet:
    """A feature net of a user's own function.

    Args:
        name: what its features are called.
        function: images [B, H, W, C] float32 in [-1, 1] -> features [B, dimension]; pure JAX, row by row.
        dimension: d.
        fingerprint: what tells this version of the function from others, such as the hash of its weights.

    Raises:
        UserError: the name is that of FID's network.
    """
    if name == FID_NETWORK:
        raise UserError(f"Feature net: {name!r} is the name of FID's network; call your own features otherwise.")
    return FeatureNet(name, lambda _, images: function(images), {}, dimension, fingerprint)


def features(feature_net: FeatureNet, images: np.ndarray, batch_size: int = 256) -> NDArray[np.float32]:
    """Features of images, batch by batch on all devices of this process, compiled once per image shape and batch size.

    The last batch is filled up with zero images, whose features are thrown away.

    Args:
        feature_net: the network.
        images: [N, H, W, C], bytes or float in [-1, 1]; N may be 0.
        batch_size: images per call of the network, filled up to a multiple of the devices; changes speed and memory
            only.

    Returns:
        [N, d] float32 on the host.

    Raises:
        UserError: images of another shape, type or range, or not finite; batch_size below 1.
    """
    output = np.empty((len(images), feature_net.dimension), np.float32)
    for start, batch in _batches(feature_net.apply, feature_net.params, images, batch_size):
        if batch.shape[1:] != (feature_net.dimension,):
            answered = f"answers {list(batch.shape[1:])} numbers for an image"
            raise UserError(f"Features: {feature_net.name} {answered}; its dimension is {feature_net.dimension}.")
        output[start : start + len(batch)] = batch
    return output


def tapped_features(
    feature_net: FeatureNet, images: np.ndarray, taps: Sequence[str], batch_size: int = 256
) -> dict[str, NDArray[np.float32]]:
    """Several outputs of a network from one pass over the images; otherwise as `features`.

    Args:
        feature_net: the network.
        images: [N, H, W, C], bytes or float in [-1, 1]; N may be 0.
        taps: which of `feature_net.taps`.
        batch_size: images per call of the network.

    Returns:
        {tap: [N, width] float32 on the host}.

    Raises:
        UserError: as `features`, or a tap that the network does not have.
    """
    unknown = [tap for tap in taps if tap not in feature_net.taps]
    if unknown or feature_net.apply_taps is None:
        known = ", ".join(feature_net.taps) or "none"
        raise UserError(f"Features: {feature_net.name} has no tap {', '.join(unknown or taps)}. It has: {known}.")
    output = {tap: np.empty((len(images), feature_net.taps[tap]), np.float32) for tap in taps}
    for start, batch in _batches(feature_net.apply_taps, feature_net.params, images, batch_size):
        for tap in taps:
            output[tap][start : start + len(batch[tap])] = batch[tap]
    return output


def _batches(
    function: Callable[[Any, jax.Array], Any], params: Any, images: np.ndarray, batch_size: int
) -> Iterator[tuple[int, Any]]:
    """(index of the first image, what the function answers for a batch from there on), without the filling images."""
    if batch_size < 1:
        raise UserError(f"Features: batch_size is {batch_size}; use at least 1.")
    images = np.asarray(images)
    if images.ndim != 4:
        raise UserError(f"Features: images have shape {list(images.shape)}; expected [N, H, W, C].")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"Features: images are {images.dtype}; expected uint8, or float32 in [-1, 1] (x / 127.5 - 1).")

    devices = jax.local_device_count()
    batch_size = -(-batch_size // devices) * devices
    compiled, params = jax.jit(function), jax.device_put(params, local_sharding())
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        rows = to_float(rows) if rows.dtype == np.uint8 else rows.astype(np.float32, copy=False)
        largest = np.abs(rows).max()
        if not largest <= 1.0 + PIXEL_TOLERANCE:
            raise UserError(f"Features: images reach |x| = {largest}; look for NaN, then clip to [-1, 1].")
        batch = np.zeros((batch_size, *images.shape[1:]), np.float32)
        batch[: len(rows)] = rows
        answer = jax.device_get(compiled(params, jax.device_put(batch, local_sharding("data"))))
        yield start, jax.tree.map(operator.itemgetter(slice(len(rows))), answer)
