"""The Inception Score of closed forms, the effect of the samples' order, and a live peer."""

import numpy as np
import pytest
from scipy.special import softmax

from nag_jax.errors import UserError
from nag_jax.metrics.inception_score import inception_score, inception_score_from_probabilities


def test_certain_and_balanced_samples_score_the_number_of_classes():
    certain = np.eye(8)[np.arange(800) % 8]
    score = inception_score_from_probabilities(certain, num_splits=5, order="as_given")
    np.testing.assert_allclose(score.scores, 8.0)
    assert score.mean == pytest.approx(8.0) and score.std == pytest.approx(0.0, abs=1e-12)


def test_equal_samples_score_one():
    logits = np.tile(np.random.default_rng(0).normal(size=20), (50, 1))
    np.testing.assert_allclose(inception_score(logits).scores, 1.0)


def test_two_classes_have_a_closed_form():
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    expected = np.exp(0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5))
    assert inception_score_from_probabilities(p, num_splits=1).mean == pytest.approx(expected)
    assert inception_score(np.log(p) + 7.0, num_splits=1).mean == pytest.approx(expected)


def test_logits_of_any_size_neither_overflow_nor_lose_zero_probabilities():
    logits = np.float32(1e4) * np.eye(4, dtype=np.float32)
    assert inception_score(logits, num_splits=1).mean == pytest.approx(4.0)


def test_sorted_samples_score_lower_unless_shuffled():
    certain = np.eye(10)[np.sort(np.arange(5000) % 10)]
    as_given = inception_score_from_probabilities(certain, order="as_given")
    shuffled = inception_score_from_probabilities(certain)
    assert as_given.mean == pytest.approx(1.0)  # each split holds one class
    assert shuffled.mean == pytest.approx(10.0, rel=0.01)
    assert inception_score_from_probabilities(certain, seed=1).mean != shuffled.mean
    assert inception_score_from_probabilities(certain).mean == shuffled.mean


def test_errors_name_what_is_wrong():
    p = np.full((20, 4), 0.25)
    with pytest.raises(UserError, match="21 splits of 20"):
        inception_score_from_probabilities(p, num_splits=21)
    with pytest.raises(UserError, match="order is 'sorted'"):
        inception_score(p, order="sorted")
    wrong = p.copy()
    wrong[3] += 0.1
    with pytest.raises(UserError, match="1 of 20 rows are no probabilities, the first is row 3"):
        inception_score_from_probabilities(wrong)
    wrong[5, 0] = np.nan
    with pytest.raises(UserError, match="row 5"):
        inception_score(wrong)


@pytest.mark.parity
@pytest.mark.parametrize("shuffle", [False, True])
def test_agrees_with_torch_fidelity(torch_fidelity, shuffle):
    import torch

    logits = (3 * np.random.default_rng(0).normal(size=(333, 21))).astype(np.float32)
    theirs = torch_fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(logits), 10, shuffle, 2020)
    order = np.random.RandomState(2020).permutation(333) if shuffle else np.arange(333)
    ours = inception_score(logits[order], order="as_given")
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-8)
    probabilities = softmax(logits[order].astype(np.float64), axis=1)
    from_probabilities = inception_score_from_probabilities(probabilities, order="as_given")
    assert from_probabilities.mean == pytest.approx(ours.mean, rel=1e-10)
