"""Features of a set of images on disk, block by block, so that a killed evaluation goes on from its last block."""

from __future__ import annotations

import math
import sys

import jax
import numpy as np
from etils import epath

from nag_jax.data.image_sets import ImageSet
from nag_jax.hosts import is_first, wait_for_all
from nag_jax.jobs.sample_store import SampleStore
from nag_jax.jobs.scores import Features, features_of, outputs_in_use
from nag_jax.metrics.features import FeatureNet
from nag_jax.progress import progress

MAX_BLOCK_ROWS = 4096
MAX_BLOCK_BYTES = 2**30  # of a block's images, which are in memory together


def block_rows(images: ImageSet) -> int:
    """Images of a block."""
    return min(MAX_BLOCK_ROWS, max(1, MAX_BLOCK_BYTES // math.prod(images.image_shape)))


def extract(feature_net: FeatureNet, images: ImageSet, folder: epath.Path, batch_size: int) -> Features:
    """Features of a set, from the blocks that are there and from the images for the others.

    Process p of P computes the blocks p, p + P, ...

    Args:
        feature_net: the network.
        images: the set.
        folder: of the blocks.
        batch_size: images per call of the network.

    Returns:
        Arrays [N, width] by tap.

    Raises:
        UserError: an image cannot be read, or a block is damaged.
    """
    store = SampleStore(folder, images.count)
    missing = {sample for samples in store.agreed_missing() for sample in samples}
    size = block_rows(images)
    firsts = range(0, images.count, size)
    own = [first for first in firsts[jax.process_index() :: jax.process_count()] if first in missing]
    done, total = images.count - len(missing), images.count
    if done and is_first():
        print(f"{done} of {total} images have their features already.", file=sys.stderr, flush=True)
    if own:
        with progress(f"features of {images.name}", total, done) as report_progress:
            for first, block in images.blocks(size, own):
                store.write(first, len(block), features_of(feature_net, block, batch_size))
                done += len(block)
                report_progress(done, "")
    wait_for_all(f"features of {images.path}")
    blocks = list(store.read(*outputs_in_use(feature_net)))
    return {tap: np.concatenate([block[tap] for block in blocks]) for tap in outputs_in_use(feature_net)}
