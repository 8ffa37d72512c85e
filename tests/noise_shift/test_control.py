"""The control has the samples' labels, and every image once."""

import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.noise_shift import matched_images


def test_images_have_the_samples_labels_in_order_and_come_once():
    rng = np.random.default_rng(0)
    sample_labels, labels = rng.integers(3, size=40), rng.integers(3, size=200)
    indices = matched_images(sample_labels, labels, limit=30)
    assert len(indices) == len(set(indices.tolist())) == 30
    np.testing.assert_array_equal(labels[indices], sample_labels[:30])
    # Of each class the first ones, so that more samples add images and change none.
    np.testing.assert_array_equal(matched_images(sample_labels, labels, limit=10), indices[:10])
    assert indices[np.flatnonzero(labels[indices] == 1)[0]] == np.flatnonzero(labels == 1)[0]


def test_samples_whose_class_has_no_image_left_are_passed_over():
    labels = np.array([0, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(matched_images(np.array([1, 0, 0, 0, 7, 1, 1]), labels, limit=100), [1, 0, 2, 3, 4])
    assert len(matched_images(np.tile([0, 1], 50), labels, limit=100)) == 6


@pytest.mark.parametrize("sample_labels", [[2, 0, 2], [], [0]])
def test_too_few_are_refused(sample_labels):
    with pytest.raises(UserError, match="at least 2.*num_reference"):
        matched_images(np.array(sample_labels, np.int32), np.array([0, 1, 0, 1]), limit=10)
