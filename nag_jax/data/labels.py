"""Label rules of sampling: which class sample i is asked for. Training labels come from the source, not here.

Published numbers differ in the rule (ADM and DiT draw labels at random, SiT's and later tables often balance
them), so a rule has a name and stands among a metric's conditions.
"""

from collections.abc import Callable

import numpy as np

from nag_jax.data.draws import Stream, permutation, words
from nag_jax.errors import UserError

LabelRule = Callable[[int, int, int], np.ndarray]


def balanced_labels(total: int, num_classes: int, seed: int) -> np.ndarray:
    """Every class equally often, in shuffled order; a function of the total count.

    Args:
      total: number of samples, >= 0. Where it is no multiple of `num_classes`, the lowest classes come once
        more.
      num_classes: >= 1.
      seed: >= 0.

    Returns:
      int32[total] in [0, num_classes).
    """
    order = permutation(Stream.BALANCED_LABELS, total, seed=seed)
    return (order % num_classes).astype(np.int32)


def random_labels(indices: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
    """Independent uniform labels; that of sample i is a function of (seed, i) alone.

    Args:
      indices: [N] int, sample indices >= 0. Time and memory grow with the span from the lowest to the
        highest.
      num_classes: >= 1.
      seed: >= 0.

    Returns:
      int32[N] in [0, num_classes).
    """
    indices = np.asarray(indices, dtype=np.int64)
    if indices.size == 0:
        return np.zeros(indices.shape, dtype=np.int32)
    first = int(indices.min())
    drawn = words(Stream.RANDOM_LABELS, int(indices.max()) - first + 1, seed=seed, start=first)
    return (drawn[indices - first] % np.uint64(num_classes)).astype(np.int32)


def _random_rule(total: int, num_classes: int, seed: int) -> np.ndarray:
    return random_labels(np.arange(total), num_classes, seed)


LABEL_RULES: dict[str, LabelRule] = {"balanced": balanced_labels, "random": _random_rule}


def label_rule(name: str) -> LabelRule:
    """The rule of that name, as a function (total, num_classes, seed) -> int32[total].

    Args:
      name: "balanced" or "random".

    Returns:
      The rule.

    Raises:
      UserError: no rule has that name.
    """
    if name not in LABEL_RULES:
        raise UserError(f"unknown label rule {name!r}; known rules: {', '.join(sorted(LABEL_RULES))}")
    return LABEL_RULES[name]
