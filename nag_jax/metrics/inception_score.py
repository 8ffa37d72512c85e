"""The Inception Score (Salimans et al. 2016) of class probabilities, and nothing about the network they come from.

exp of the mean KL divergence of p(class | image) from the mean of p over a split, averaged over splits.

A split's mean stands for the classes of all samples, so the order of the samples matters: sorted by class, a split
holds few classes and scores far lower. Samples are shuffled unless told otherwise. The score also falls with smaller
splits, so it compares only at equal sample and split counts.

The published ImageNet numbers (ADM's evaluator) are of splits of 5,000 samples in the order of the file: the same as
`order="as_given"` with 10 splits of 50,000 samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, xlogy

from nag_jax.errors import UserError
from nag_jax.metrics.checks import check_vectors

SUM_TOLERANCE = 1e-3

Order = Literal["shuffled", "as_given"]


@dataclass(frozen=True, eq=False)
class InceptionScore:
    """Mean and standard deviation (divided by the number of splits) over the splits' scores [num_splits], each >= 1."""

    mean: float
    std: float
    scores: NDArray[np.float64]


def inception_score(
    logits: ArrayLike, *, num_splits: int = 10, order: Order = "shuffled", seed: int = 0
) -> InceptionScore:
    """The score of logits, in float64.

    Args:
        logits: [N, classes] finite; for the Inception Score the 1,008 of the network of 2015, without the bias.
        num_splits: 1 to N; split i is rows i N // num_splits to (i + 1) N // num_splits.
        order: "shuffled" by `seed`, or "as_given".
        seed: seed of the shuffling.

    Raises:
        UserError: wrong shape, values that are not finite, or a setting out of range.
    """
    return _score(check_vectors(logits, "Inception Score, logits"), True, num_splits, order, seed)


def inception_score_from_probabilities(
    probabilities: ArrayLike, *, num_splits: int = 10, order: Order = "shuffled", seed: int = 0
) -> InceptionScore:
    """The same of probabilities [N, classes], whose rows sum to 1.

    Raises:
        UserError: as `inception_score`, or rows that are no probabilities.
    """
    p = check_vectors(probabilities, "Inception Score, probabilities")
    wrong = (p.min(axis=1) < 0.0) | (np.abs(p.sum(axis=1, dtype=np.float64) - 1.0) > SUM_TOLERANCE)
    if wrong.any():
        raise UserError(
            f"Inception Score: {wrong.sum()} of {len(p)} rows are no probabilities, the first is row "
            f"{wrong.argmax()}; for logits use inception_score."
        )
    return _score(p, False, num_splits, order, seed)


def _score(values: NDArray, are_logits: bool, num_splits: int, order: Order, seed: int) -> InceptionScore:
    num_rows = len(values)
    if not 1 <= num_splits <= num_rows:
        raise UserError(f"Inception Score: {num_splits} splits of {num_rows} samples; use 1 to {num_rows} splits.")
    if order not in ("shuffled", "as_given"):
        raise UserError(f"Inception Score: order is {order!r}; use 'shuffled' or 'as_given'.")
    rows = np.random.default_rng(seed).permutation(num_rows) if order == "shuffled" else np.arange(num_rows)
    ends = np.arange(num_splits + 1) * num_rows // num_splits
    scores = []
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        split = values[rows[begin:end]].astype(np.float64)
        if are_logits:
            log_p = log_softmax(split, axis=1)
            p = np.exp(log_p)
            negative_entropy = (p * log_p).sum()
        else:
            p = split
            negative_entropy = xlogy(p, p).sum()
        mean = p.mean(axis=0)
        scores.append(np.exp(negative_entropy / len(p) - xlogy(mean, mean).sum()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), np.array(scores))
