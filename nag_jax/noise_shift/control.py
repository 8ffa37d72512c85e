"""Which held-out images are the control of samples: a method is judged against real data of its own classes."""

from __future__ import annotations

import numpy as np

from nag_jax.errors import UserError


def matched_images(sample_labels: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    """Held-out images with the labels of the samples.

    Goes through the samples in order and takes for each the next unused image of its class; a sample whose class has
    none left is passed over. No image comes twice: a repeated one would count as independent in a bootstrap. So the
    classes are in the samples' proportions as far as the held-out images go.

    Args:
        sample_labels: of the samples, int [N].
        labels: of the held-out images, int [M].
        limit: images at most.

    Returns:
        Indices of images, int64 [K], K <= limit, in the order of the samples that they stand beside.

    Raises:
        UserError: fewer than two images match.
    """
    unused: dict[int, list[int]] = {}
    for index in reversed(range(len(labels))):
        unused.setdefault(int(labels[index]), []).append(index)
    indices: list[int] = []
    for label in map(int, sample_labels):
        if len(indices) < limit and unused.get(label):
            indices.append(unused[label].pop())
    if len(indices) < 2:
        raise UserError(
            f"Of {len(labels)} held-out images only {len(indices)} have a label of the samples, and the noise shift "
            "needs at least 2. Raise config.eval.num_reference or config.eval.num_samples, or choose another "
            "config.data.eval_split."
        )
    return np.asarray(indices, np.int64)
