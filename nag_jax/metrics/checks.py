"""What every metric asks of the vectors that it is given: a finite matrix of enough rows. It computes nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nag_jax.errors import UserError


def check_vectors(values: ArrayLike, name: str, at_least: int = 1) -> NDArray:
    """`values` as an array, as they are.

    Args:
        values: [N, d].
        name: what an error calls them.
        at_least: the smallest N that the metric is defined for.

    Raises:
        UserError: wrong shape, too few vectors, or values that are not finite.
    """
    x = np.asarray(values)
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype.kind not in "fiu":
        raise UserError(f"{name}: expected numbers of shape [N, d], got {x.dtype} of shape {list(x.shape)}.")
    if len(x) < at_least:
        raise UserError(f"{name}: {len(x)} vectors; this metric needs at least {at_least}.")
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise UserError(
            f"{name}: {bad.sum()} of {len(x)} rows contain NaN or infinity, the first is row {bad.argmax()}; "
            "look at the images they came from."
        )
    return x


def check_same_dimension(first: int, second: int) -> None:
    """Raises UserError unless both sets of vectors have the same number of dimensions."""
    if first != second:
        raise UserError(f"Features of {first} and {second} dimensions do not compare; use one feature net.")
