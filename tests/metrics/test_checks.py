"""What is asked of feature vectors."""

import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.metrics.checks import check_same_dimension, check_vectors


def test_good_vectors_come_back_as_they_are():
    x = np.zeros((3, 2), np.float32)
    assert check_vectors(x, "x", at_least=3) is x
    assert check_vectors([[1, 2]], "x").tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), r"real: expected numbers of shape \[N, d\], got float64 of shape \[3\]"),
        (np.zeros((3, 0)), r"shape \[3, 0\]"),
        (np.array([["a"]]), "expected numbers"),
        (np.zeros((1, 2)), "real: 1 vectors; this metric needs at least 2"),
        (np.array([[0.0], [np.inf], [np.nan]]), "real: 2 of 3 rows contain NaN or infinity, the first is row 1"),
    ],
)
def test_wrong_vectors_are_named(values, message):
    with pytest.raises(UserError, match=message):
        check_vectors(values, "real", at_least=2)


def test_dimensions_must_agree():
    check_same_dimension(3, 3)
    with pytest.raises(UserError, match="3 and 4 dimensions"):
        check_same_dimension(3, 4)
