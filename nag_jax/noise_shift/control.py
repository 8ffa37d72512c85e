"""Which held-out images are the control of samples: a method is judged against real data of its own classes."""

from __future__ import annotations

import numpy as np

from nag_jax.errors import UserError


def matched_images(sample_labels: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    """Held-out images with the labels of the first samples.

    Goes through the samples in order and takes for each the next unused image of its class, until a class has none
    left. No image comes twice: a repeated one would count as independent in a bootstrap.

    Args:
        sample_labels: of the samples, int [N].
        labels: of the held-out images, int [M].
        limit: images at most.

    Returns:
        Indices of images, int64 [K], K <= limit: the label of image indices[i] is that of sample i.

    Raises:
        UserError: fewer than two images match.
    """
    unused: dict[int, list[int]] = {}
    for index in reversed(range(len(labels))):
        unused.setdefault(int(labels[index]), []).append(index)
    indices: list[int] = []
    for label in map(int, sample_labels[:limit]):
        if not unused.get(label):
            break
        indices.append(unused[label].pop())
    if len(indices) < 2:
        raise UserError(
            f"Of {len(labels)} held-out images {len(indices)} can stand beside the samples' labels (noise_shift."
            f"num_forward = {limit} at most), and the noise shift needs at least 2: the classes of the first samples "
            "have too few. Raise config.eval.num_reference or config.noise_shift.num_forward, or choose another "
            "config.data.eval_split."
        )
    return np.asarray(indices, np.int64)
