"""Label rules: balance, independence of the count, clear errors."""

import numpy as np
import pytest

from nag_jax.data.labels import balanced_labels, label_rule, random_labels
from nag_jax.errors import UserError


@pytest.mark.parametrize("total", [0, 1, 10, 53, 1000])
def test_balanced_labels_differ_by_one_at_most(total: int):
    labels = balanced_labels(total, 10, seed=4)
    counts = np.bincount(labels, minlength=10)
    assert labels.dtype == np.int32 and counts.sum() == total and counts.max() - counts.min() <= 1


def test_balanced_labels_are_shuffled_by_the_seed():
    labels = balanced_labels(200, 10, seed=0)
    assert not np.array_equal(labels, np.arange(200) % 10)
    assert not np.array_equal(labels, balanced_labels(200, 10, seed=1))
    np.testing.assert_array_equal(labels, balanced_labels(200, 10, seed=0))


def test_random_label_depends_on_seed_and_index_alone():
    labels = random_labels(np.arange(1000), 7, seed=5)
    asked = np.array([999, 3, 500, 3])
    np.testing.assert_array_equal(random_labels(asked, 7, seed=5), labels[asked])
    np.testing.assert_array_equal(label_rule("random")(300, 7, 5), labels[:300])
    assert labels.dtype == np.int32 and not np.array_equal(labels, random_labels(np.arange(1000), 7, seed=6))
    assert random_labels(np.array([], int), 7, seed=5).shape == (0,)


def test_random_labels_are_uniform():
    counts = np.bincount(random_labels(np.arange(20000), 5, seed=0), minlength=5)
    assert np.abs(counts - 4000).max() < 4.5 * np.sqrt(20000 * 0.2 * 0.8)


def test_unknown_rule_names_the_known_ones():
    with pytest.raises(UserError, match=r"'equal'.*balanced, random"):
        label_rule("equal")
