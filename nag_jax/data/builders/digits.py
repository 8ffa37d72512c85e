"""A TFDS builder of scikit-learn's 1,797 handwritten digits; needs neither a download nor TensorFlow.

The images are 8x8 with values 0 to 16 (UCI "Optical Recognition of Handwritten Digits", its test part, 13
writers). They are stored as 8-bit greyscale PNG with value v as round(255 v / 16): 17 distinct levels from
black to white, so round(16 u / 255) gives v back exactly.
"""

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NUM_TEST = 500


class Digits(tfds.core.GeneratorBasedBuilder):
    """The data set "digits": splits `train` (1,297) and `test` (500), features `image` and `label`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    # Nothing is downloaded. Said here, TFDS need not search for a checksum file, for which it wants
    # importlib_resources.
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits of 8x8 pixels with 17 grey levels, in ten classes.",
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = levels_to_uint8(digits.images)
        held_out = held_out_mask(digits.target)
        return {
            "train": _examples(images, digits.target, np.flatnonzero(~held_out)),
            "test": _examples(images, digits.target, np.flatnonzero(held_out)),
        }

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        raise NotImplementedError("the splits carry their own generators")


def levels_to_uint8(levels: np.ndarray) -> np.ndarray:
    """Grey levels 0..16 as uint8 0..255, injectively.

    Args:
      levels: any shape, integer-valued in [0, 16].

    Returns:
      uint8 of the same shape.
    """
    return np.rint(levels * (255.0 / 16.0)).astype(np.uint8)


def uint8_to_levels(pixels: np.ndarray) -> np.ndarray:
    """The inverse of `levels_to_uint8`.

    Args:
      pixels: any shape, uint8.

    Returns:
      int64 of the same shape, in [0, 16].
    """
    return np.rint(pixels * (16.0 / 255.0)).astype(np.int64)


def held_out_mask(labels: np.ndarray, num_test: int = NUM_TEST) -> np.ndarray:
    """Which records are the test split: a systematic sample of the records sorted by class, then by position.

    Each class gives its share of `num_test` to within one record, spread evenly over the class, and so over
    the writers, who follow each other in the original order. No random numbers are drawn.

    Args:
      labels: [N] int.
      num_test: how many records to hold out, 0 to N.

    Returns:
      [N] bool with exactly `num_test` ones.
    """
    by_class = np.argsort(labels, kind="stable")
    position = np.arange(len(labels))
    chosen = (position + 1) * num_test // len(labels) > position * num_test // len(labels)
    mask = np.zeros(len(labels), dtype=bool)
    mask[by_class[chosen]] = True
    return mask


def _examples(
    images: np.ndarray, labels: np.ndarray, indices: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Keys (the record's index in scikit-learn's order) with their examples; images go in as encoded bytes.

    An array would make TFDS encode it with TensorFlow.
    """
    for index in indices:
        png = io.BytesIO()
        Image.fromarray(images[index]).save(png, format="png")
        yield int(index), {"image": png.getvalue(), "label": int(labels[index])}
