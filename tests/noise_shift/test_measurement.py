"""The measured shift: nothing where there is nothing, what was put in where something was, and its intervals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.denoiser import from_function
from nag_jax.diffusion.analytic import make_mixture
from nag_jax.diffusion.analytic_gaussian import perturbed_variance
from nag_jax.diffusion.guidance import nag, plain
from nag_jax.diffusion.process import Linear
from nag_jax.diffusion.stepping import Heun
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.noise_shift import measure
from nag_jax.noise_shift.answers import Answers, answer
from nag_jax.noise_shift.calibration import Calibration
from nag_jax.noise_shift.measurement import compare_answers

TIMES = np.array([0.8, 0.5, 0.2])
GRID = np.linspace(0.02, 0.98, 25)


def answers_at(rng, times, count, curve, spread=0.1):
    """Answers curve(t) + noise of a simulated estimator at level `times` [T]: [T, count]."""
    mean = curve(np.asarray(times))[:, None] + spread * rng.standard_normal((len(times), count))
    return Answers(mean, np.full_like(mean, spread**2))


def calibration_of(curve, error=0.0) -> Calibration:
    means = curve(GRID) + error
    return Calibration(tuple(GRID.tolist()), tuple(means.tolist()), (0.1,) * len(GRID))


CURVES = {
    "shrinking": lambda t: 0.3 + 0.4 * t,
    "curved": lambda t: 0.1 + 0.7 * t**2 + 0.1 * t,
}


@pytest.mark.parametrize("name", CURVES)
def test_a_shift_that_was_put_in_is_recovered(name):
    curve, rng, shift = CURVES[name], np.random.default_rng(0), np.array([-0.03, 0.02, 0.05])
    forward, sampled = answers_at(rng, TIMES, 20000, curve), answers_at(rng, TIMES + shift, 20000, curve)
    measured = compare_answers(TIMES, sampled, forward, calibration_of(curve), seed=0, num_resamples=200)
    np.testing.assert_array_equal(measured.times, TIMES[::-1])
    for at_time, expected in zip(measured.shifts, shift[::-1], strict=True):
        interval = at_time.calibrated_shift
        assert interval.low < interval.estimate < interval.high
        # Half the interval is about two standard errors; four are allowed, and the grid's linear pieces.
        assert abs(interval.estimate - expected) < (interval.high - interval.low) + 5e-4
        raw = curve(at_time.t + expected) - curve(at_time.t)
        assert abs(at_time.raw_shift.estimate - raw) < at_time.raw_shift.high - at_time.raw_shift.low
        assert abs(raw) < 0.9 * abs(expected) or name == "curved"
        np.testing.assert_allclose([at_time.forward_deviation, at_time.sampled_deviation], 0.1)


def test_intervals_cover_no_shift_as_often_as_they_say():
    curve, rng, num_trials = CURVES["shrinking"], np.random.default_rng(1), 150
    # The calibration is off by .02: the control cancels it.
    calibration = calibration_of(curve, error=0.02)
    covered = {"raw_shift": 0, "calibrated_shift": 0}
    for trial in range(num_trials):
        sides = [answers_at(rng, TIMES, count, curve) for count in (100, 60)]
        for at_time in compare_answers(TIMES, *sides, calibration, seed=trial, num_resamples=200).shifts:
            for name in covered:
                interval = getattr(at_time, name)
                covered[name] += interval.low <= 0.0 <= interval.high
    for count in covered.values():
        share = count / (num_trials * len(TIMES))
        # 450 nearly independent cases of 95 %: a standard error of one per cent.
        assert 0.91 < share < 0.985


def test_the_mean_absolute_shift_is_the_mean_over_times():
    curve, rng, shift = CURVES["shrinking"], np.random.default_rng(4), np.array([-0.03, 0.02, 0.05])
    sides = answers_at(rng, TIMES + shift, 20000, curve), answers_at(rng, TIMES, 20000, curve)
    measured = compare_answers(TIMES, *sides, calibration_of(curve), seed=0, num_resamples=200)
    size = measured.mean_absolute_shift
    estimates = [at_time.calibrated_shift.estimate for at_time in measured.shifts]
    np.testing.assert_allclose(size.estimate, np.mean(np.abs(estimates)))
    assert size.low < size.estimate < size.high
    # Far from zero the absolute value is linear: the error is that of a mean of three independent shifts.
    widths = [at_time.calibrated_shift.high - at_time.calibrated_shift.low for at_time in measured.shifts]
    np.testing.assert_allclose(size.high - size.low, np.sqrt(np.square(widths).sum()) / 3, rtol=0.2)
    assert abs(size.estimate - np.abs(shift).mean()) < size.high - size.low


@pytest.mark.parametrize("shift", [0.0, 0.03])
def test_the_mean_absolute_shift_s_interval_covers_its_expected_value(shift):
    curve, rng, num_trials = CURVES["shrinking"], np.random.default_rng(5), 300
    sizes = [
        compare_answers(
            TIMES,
            answers_at(rng, TIMES + shift, 100, curve),
            answers_at(rng, TIMES, 60, curve),
            calibration_of(curve),
            seed=trial,
            num_resamples=100,
        ).mean_absolute_shift
        for trial in range(num_trials)
    ]
    expected = np.mean([size.estimate for size in sizes])
    assert expected > shift
    share = np.mean([size.low <= expected <= size.high for size in sizes])
    assert share > 0.91


def test_the_control_s_own_error_is_in_the_interval():
    curve, rng = CURVES["shrinking"], np.random.default_rng(2)
    sampled = answers_at(rng, TIMES, 5000, curve)
    for count in (50, 500):
        forward = answers_at(rng, TIMES, count, curve)
        measured = compare_answers(TIMES, sampled, forward, calibration_of(curve), seed=0).shifts[0].raw_shift
        expected = 2 * 1.96 * 0.1 * np.sqrt(1 / 5000 + 1 / count)
        np.testing.assert_allclose(measured.high - measured.low, expected, rtol=0.25)


def test_json_has_numbers_only_and_null_where_there_is_none():
    rng, silent = np.random.default_rng(3), calibration_of(lambda t: np.full_like(t, 0.5))
    sides = [answers_at(rng, TIMES, 10, CURVES["shrinking"]) for _ in range(2)]
    content = json.loads(json.dumps(compare_answers(TIMES, *sides, silent, seed=0).to_json(), allow_nan=False))
    assert content["num_forward"] == content["num_sampled"] == 10
    assert [shift["t"] for shift in content["shifts"]] == sorted(TIMES)
    assert content["shifts"][0]["calibrated_shift"] == {"estimate": None, "low": None, "high": None}
    assert content["mean_absolute_shift"] == {"estimate": None, "low": None, "high": None}
    raw = content["shifts"][0]["raw_shift"]
    assert raw["low"] < raw["high"]


def test_answers_of_other_shapes_are_refused():
    rng = np.random.default_rng(0)
    good, bad = (answers_at(rng, times, 5, CURVES["curved"]) for times in (TIMES, TIMES[:2]))
    with pytest.raises((UserError, IndexError)):
        compare_answers(TIMES, bad, good, calibration_of(CURVES["curved"]), seed=0)
    with pytest.raises(UserError, match="confidence"):
        compare_answers(TIMES, good, good, calibration_of(CURVES["curved"]), seed=0, level=95)


DIMENSION, VARIANCE = 40, 0.05


@pytest.fixture(scope="module")
def gaussian():
    mixture = make_mixture(Linear(), np.zeros((1, DIMENSION)), covariances=VARIANCE, levels=Linear().levels(60))
    estimator = Estimator(*mixture.time_posterior())
    images = np.asarray(mixture.sample_data(mixture.params, jax.random.key(5), 400))
    return mixture, estimator, images, np.zeros(len(images), np.int32)


def test_an_exact_sampler_has_no_shift(gaussian):
    mixture, estimator, images, labels = gaussian
    shifts = measure(
        mixture.denoiser(),
        estimator,
        images,
        labels,
        guidances={"plain": plain(), "off": nag(0.0)},
        stepper=Heun(),
        num_steps=20,
        times=(0.2, 0.5, 0.8),
        num_nodes=60,
        batch_size=150,
        num_resamples=300,
    )
    for at_time in shifts["plain"].shifts:
        raw = at_time.raw_shift
        # Three half widths: 99.99 % of exact samplers pass, and one whose states are off by .01 does not.
        assert abs(raw.estimate) < 1.5 * (raw.high - raw.low) and raw.high - raw.low < 0.02
    np.testing.assert_allclose(shifts["off"].sampled_answers, shifts["plain"].sampled_answers, atol=1e-6)


def test_a_wrong_score_shifts_the_states_as_its_variance_says(gaussian):
    mixture, estimator, images, labels = gaussian
    score_error, times = -0.3, np.array([0.2, 0.5, 0.8])

    def wrong_score(x, t, labels):
        variance = (1 - t) ** 2 * VARIANCE + t**2
        return -(1 + score_error) * x / variance[:, None]

    denoiser = from_function(wrong_score, Linear(), "score", num_classes=1, sample_shape=(DIMENSION,))
    shift = measure(
        denoiser,
        estimator,
        images,
        labels,
        stepper=Heun(t_max=0.98, t_min=0.02),
        num_steps=48,
        times=times,
        num_nodes=60,
        num_samples=800,
        num_resamples=300,
    )["plain"]
    path = np.concatenate([[0.98], times[::-1]])
    variances = perturbed_variance(Linear(), VARIANCE, score_error, path, initial_variance=1.0)[:0:-1]
    normal = np.random.default_rng(0).standard_normal((20000, DIMENSION)).astype(np.float32)
    ask = jax.jit(lambda x: answer(estimator.posterior, estimator.params, x, 60).mean)
    for at_time, variance in zip(shift.shifts, variances, strict=True):
        expected = np.mean(ask(jnp.asarray(np.sqrt(variance) * normal)))
        interval = at_time.sampled_answer
        assert abs(interval.estimate - expected) < 1.5 * (interval.high - interval.low)
        assert at_time.raw_shift.low > 0.0


def test_data_that_do_not_fit_the_denoiser(gaussian):
    mixture, estimator, images, labels = gaussian
    with pytest.raises(UserError, match="do not fit"):
        measure(mixture.denoiser(), estimator, images, labels[:3])
