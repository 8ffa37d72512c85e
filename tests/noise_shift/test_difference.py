"""The paired difference of two shifts' sizes: recovered, covered, narrower than unpaired, and refused if not paired."""

import json

import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.noise_shift.answers import Answers
from nag_jax.noise_shift.calibration import Calibration
from nag_jax.noise_shift.difference import NAG_PAIRS, paired_size_difference, shift_differences
from nag_jax.noise_shift.measurement import compare_answers

TIMES = np.array([0.2, 0.5, 0.8])
GRID = np.linspace(0.02, 0.98, 25)
SLOPE, SPREAD = 0.5, 0.1
CALIBRATION = Calibration(tuple(GRID), tuple(0.2 + SLOPE * GRID), (SPREAD,) * len(GRID))


def answers_of(deviations, times):
    mean = 0.2 + SLOPE * times[:, None] + SPREAD * deviations
    return Answers(mean, np.full_like(mean, SPREAD**2))


def measured(rng, *shifts, correlation=0.9, num_samples=200, num_images=150, num_resamples=2):
    """Noise shifts of simulated methods whose answers on the same samples are correlated, against one control."""
    forward = answers_of(rng.standard_normal((len(TIMES), num_images)), TIMES)
    common = rng.standard_normal((len(TIMES), num_samples))
    noises = [rng.standard_normal(common.shape) for _ in shifts]
    return [
        compare_answers(
            TIMES,
            answers_of(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * noise, TIMES + shift),
            forward,
            CALIBRATION,
            seed=0,
            num_resamples=num_resamples,
        )
        for shift, noise in zip(shifts, noises, strict=True)
    ]


def test_a_difference_that_was_put_in_is_recovered():
    a, b = measured(np.random.default_rng(0), np.array([-0.04, 0.05, 0.1]), 0.08, num_samples=20000, num_images=20000)
    difference = paired_size_difference(a, b, CALIBRATION, seed=1, num_resamples=200)
    np.testing.assert_array_equal(difference.times, TIMES)
    for interval, expected in zip(
        (*difference.by_time, difference.mean_absolute), (-0.04, -0.03, 0.02, -0.05 / 3), strict=True
    ):
        assert interval.low < interval.estimate < interval.high
        # Half the interval is about two standard errors; four are allowed.
        assert abs(interval.estimate - expected) < interval.high - interval.low
    sizes = [shift.mean_absolute_shift.estimate for shift in (a, b)]
    np.testing.assert_allclose(difference.mean_absolute.estimate, sizes[0] - sizes[1])


def test_what_is_shared_cancels():
    a, b = measured(np.random.default_rng(1), 0.1, 0.1, correlation=0.99, num_resamples=200)
    difference = paired_size_difference(a, b, CALIBRATION, seed=0, num_resamples=300).mean_absolute
    # Far from zero the size is linear: the control cancels and each sample leaves the difference of its two answers.
    deviation = np.sqrt(2 * 0.01 / 200 / len(TIMES)) * SPREAD / SLOPE
    np.testing.assert_allclose(difference.high - difference.low, 2 * 1.96 * deviation, rtol=0.2)
    unpaired = [shift.mean_absolute_shift.high - shift.mean_absolute_shift.low for shift in (a, b)]
    assert difference.high - difference.low < 0.2 * np.hypot(*unpaired)
    same = paired_size_difference(a, a, CALIBRATION, seed=0, num_resamples=50)
    assert same.mean_absolute == (0.0, 0.0, 0.0)


# Both far from zero; at zero, where the size has its kink; and within the error; of other sign.
@pytest.mark.parametrize("shift_a, shift_b", [(0.1, 0.1), (0.0, 0.0), (0.03, 0.03), (0.04, -0.04)])
def test_equal_sizes_are_seldom_called_different(shift_a, shift_b):
    rng, num_trials = np.random.default_rng(2), 150
    covered = []
    for trial in range(num_trials):
        pair = measured(rng, shift_a, shift_b, num_samples=100, num_images=60)
        difference = paired_size_difference(*pair, CALIBRATION, seed=trial, num_resamples=200)
        covered.append([each.low <= 0.0 <= each.high for each in (difference.mean_absolute, *difference.by_time)])
    # 95 % of 150 trials has a standard error of 1.8 %, and less for the three times together.
    assert np.mean(covered, axis=0)[0] > 0.9 and np.mean(covered) > 0.92


def test_other_sizes_are_found_as_often_as_their_error_says():
    rng, num_trials, gap = np.random.default_rng(3), 100, 0.012
    covered, seen = 0, 0
    for trial in range(num_trials):
        pair = measured(rng, 0.1, 0.1 + gap)
        interval = paired_size_difference(*pair, CALIBRATION, seed=trial, num_resamples=200).mean_absolute
        covered += interval.low <= -gap <= interval.high
        seen += interval.high < 0.0
    assert covered > 88
    # The gap is 3.3 standard errors of sqrt(2 (1 - .9) / 200 / 3) SPREAD / SLOPE: power 90 %.
    assert seen > 78


def test_only_pairs_are_compared():
    rng = np.random.default_rng(4)
    (a, b), (other,) = measured(rng, 0.1, 0.05), measured(rng, 0.1)
    for wrong in (other, measured(np.random.default_rng(4), 0.1, num_samples=100)[0]):
        with pytest.raises(UserError, match="same forward control"):
            paired_size_difference(a, wrong, CALIBRATION, seed=0)
    with pytest.raises(UserError, match="confidence"):
        paired_size_difference(a, b, CALIBRATION, seed=0, level=95)


def test_json_of_every_whole_pair():
    a, b = measured(np.random.default_rng(5), 0.02, 0.1)
    content = shift_differences({"nag": a, "plain": b, "cfg+nag": a}, CALIBRATION, seed=0, num_resamples=50)
    assert list(content) == ["nag"] and content["nag"]["against"] == NAG_PAIRS["nag"] == "plain"
    assert [at_time["t"] for at_time in content["nag"]["by_time"]] == TIMES.tolist()
    for interval in (content["nag"]["mean_absolute"], *content["nag"]["by_time"]):
        assert interval["low"] < interval["estimate"] < interval["high"] < 0.0
    assert json.loads(json.dumps(content, allow_nan=False)) == content


def test_without_a_calibration_there_is_no_difference():
    a, b = measured(np.random.default_rng(6), 0.1, 0.05)
    silent = Calibration((0.1, 0.9), (0.5, 0.5), (0.1, 0.1))
    content = paired_size_difference(a, b, silent, seed=0, num_resamples=20).to_json()
    assert content["mean_absolute"] == {"estimate": None, "low": None, "high": None}
