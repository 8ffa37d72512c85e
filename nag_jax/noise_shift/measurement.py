"""Measures the noise shift: how much noisier (or cleaner) a sampler's states look than they should.

An estimator g says the noise level of states. Its average answer on a sampler's states at time t is compared with that
on forward states of held-out data at the same t (arXiv 2510.12497). Training an estimator is in `estimator.py`; the
figure is in `figure.py`. `measure` does the whole for a denoiser; a job that samples anyway puts an `AnswerObserver`
into its sampler and calls `compare_answers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nag_jax.denoiser import Denoiser
from nag_jax.diffusion.corrections import Correction
from nag_jax.diffusion.guidance import Guidance, plain
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import Euler, Stepper
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.metrics.bootstrap import reflected_ends
from nag_jax.noise_shift.answers import NUM_NODES, AnswerObserver, Answers, forward_answers
from nag_jax.noise_shift.calibration import Calibration, calibrate

DEFAULT_TIMES = (0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """The numbers by name; null where there is none."""
        return {name: _number_or_none(value) for name, value in self._asdict().items()}


@dataclasses.dataclass(frozen=True)
class ShiftAtTime:
    """The noise shift at one time.

    Attributes:
        t: true time.
        forward_answer: mean answer on forward states of held-out data (the control).
        sampled_answer: mean answer on the sampler's states.
        raw_shift: sampled_answer - forward_answer.
        calibrated_shift: the same difference in true time, m^-1(sampled_answer) - m^-1(forward_answer).
        forward_deviation, sampled_deviation: root of the mean variance that the estimator itself predicts.
    """

    t: float
    forward_answer: Interval
    sampled_answer: Interval
    raw_shift: Interval
    calibrated_shift: Interval
    forward_deviation: float
    sampled_deviation: float


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseShift:
    """The noise shift of one sampler.

    Attributes:
        shifts: one per time, ascending.
        mean_absolute_shift: the calibrated shift's absolute value, averaged over the times.
        level: of the confidence intervals, each on its own.
        num_resamples: bootstrap resamples behind them.
        forward_answers: [T, M], single answers on forward states, for densities.
        sampled_answers: [T, N], single answers on sampled states.
    """

    shifts: tuple[ShiftAtTime, ...]
    mean_absolute_shift: Interval
    level: float
    num_resamples: int
    forward_answers: np.ndarray
    sampled_answers: np.ndarray

    @property
    def times(self) -> np.ndarray:
        """The times [T], ascending."""
        return np.array([shift.t for shift in self.shifts])

    def to_json(self) -> dict[str, Any]:
        """The measurement without single answers, as plain numbers; null where there is no answer."""
        return {
            "confidence_level": self.level,
            "num_resamples": self.num_resamples,
            "num_forward": self.forward_answers.shape[1],
            "num_sampled": self.sampled_answers.shape[1],
            "mean_absolute_shift": self.mean_absolute_shift.to_json(),
            "shifts": [_shift_to_json(shift) for shift in self.shifts],
        }


def compare_answers(
    times: np.ndarray,
    sampled: Answers,
    forward: Answers,
    calibration: Calibration,
    *,
    seed: int,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> NoiseShift:
    """The noise shift from an estimator's answers.

    The calibrated shift is m^-1(E[g(x_hat_t)]) - m^-1(E[g(x_t)]). Its second term is t but for sampling error, and is
    asked instead of t because then an error of the calibration at t cancels and only m's slope is left of it. So the
    control may be of the same held-out images as the calibration, as long as its noise is drawn anew.

    Intervals are percentile bootstraps over samples and, independently, over held-out images: both sides' sampling
    error is in them. A sample is drawn with its answers at all times. Samples are taken as independent; where both
    sides have the same fixed labels the intervals are a little too wide. Two guidances on the same noise err together,
    so their difference is known better than their intervals say: see `difference.py`.

    The mean absolute shift is the exception: sampling error adds to an absolute value and never cancels. Its interval
    is `reflected_ends`, one for the expected value at these counts; so methods compare at equal counts only, and
    without any shift it is not zero.

    Args:
        times: true times [T].
        sampled: answers [T, N] on a sampler's states.
        forward: answers [T, M] on forward states of held-out data at the same times and with the same distribution of
            labels.
        calibration: of the same estimator.
        seed: of the resamples.
        level: of the confidence intervals, in (0, 1).
        num_resamples: bootstrap resamples.

    Returns:
        The shift at each time, ascending in t.

    Raises:
        UserError: shapes do not agree, or fewer than two samples or images.
    """
    order = np.argsort(times)
    times = np.asarray(times, np.float64)[order]
    forward, sampled = (Answers(*(np.asarray(leaf, np.float64)[order] for leaf in side)) for side in (forward, sampled))
    for name, side in (("forward", forward), ("sampled", sampled)):
        if side.mean.shape[:1] != times.shape or side.mean.ndim != 2 or side.mean.shape[1] < 2:
            raise UserError(f"{name} answers of shape {side.mean.shape}: need [{len(times)}, at least 2].")
    if not 0.0 < level < 1.0:
        raise UserError(f"A confidence level lies between 0 and 1, got {level}.")

    rng = np.random.default_rng(seed)
    # Row 0 of each is the estimate itself, the rest are resamples.
    forward_means = resampled_means(forward.mean, num_resamples, rng)
    sampled_means = resampled_means(sampled.mean, num_resamples, rng)
    quantities = {
        "forward_answer": forward_means,
        "sampled_answer": sampled_means,
        "raw_shift": sampled_means - forward_means,
        "calibrated_shift": calibration.level(sampled_means) - calibration.level(forward_means),
    }
    tails = (0.5 - 0.5 * level, 0.5 + 0.5 * level)
    ends = {name: np.quantile(values[1:], tails, axis=0) for name, values in quantities.items()}
    shifts = tuple(
        ShiftAtTime(
            t=float(t),
            **{
                name: Interval(float(values[0, i]), float(ends[name][0, i]), float(ends[name][1, i]))
                for name, values in quantities.items()
            },
            forward_deviation=float(np.sqrt(forward.variance[i].mean())),
            sampled_deviation=float(np.sqrt(sampled.variance[i].mean())),
        )
        for i, t in enumerate(times)
    )
    sizes = np.abs(quantities["calibrated_shift"]).mean(axis=1)
    low, high = reflected_ends(sizes[0], sizes[1:], level)
    mean_absolute_shift = Interval(float(sizes[0]), float(np.maximum(low, 0.0)), float(high))
    return NoiseShift(shifts, mean_absolute_shift, level, num_resamples, forward.mean, sampled.mean)


def measure(
    denoiser: Denoiser,
    estimator: Estimator,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    guidances: Mapping[str, Guidance] | None = None,
    stepper: Stepper | None = None,
    num_steps: int = 50,
    times: Sequence[float] = DEFAULT_TIMES,
    seed: int = 0,
    batch_size: int = 256,
    num_samples: int | None = None,
    calibration: Calibration | None = None,
    networks: Mapping[str, Denoiser] | None = None,
    corrections: Sequence[Correction] = (),
    guiding_estimator: Estimator | None = None,
    level: float = 0.95,
    num_resamples: int = 1000,
    num_nodes: int = NUM_NODES,
) -> dict[str, NoiseShift]:
    """Samples with each guidance, on the same noise and labels, and measures the noise shift of each.

    Args:
        denoiser: what is sampled.
        estimator: what judges the states: a trained estimator or an exact posterior.
        images: held-out data x_0, float32 [M, ...], the control.
        labels: their labels, int32 [M]; samples get the same ones, in this order and over again.
        guidances: guidances by name; default {"plain": plain()}.
        stepper: `Euler()` if None.
        num_steps: steps of the stepper.
        times: times to measure at; of each the nearest time at which the sampler asks the denoiser is taken.
        seed: of samples, control and intervals.
        batch_size: states per call.
        num_samples: samples per guidance; default as many as images. A multiple of that keeps the labels' distribution.
        calibration: of `estimator`; made on `images` with noise of its own if None.
        networks: other denoisers that branches name.
        corrections: applied to every guided prediction.
        guiding_estimator: time posterior for posterior null branches and corrections. Not `estimator`, unless that is
            exact: no method is to be judged by the network that steers it.
        level: of the confidence intervals.
        num_resamples: bootstrap resamples.
        num_nodes: quadrature nodes of a posterior that is not Gaussian; an exact mixture takes as many as its levels.

    Returns:
        Guidance name to its noise shift.

    Raises:
        UserError: images and labels do not agree; or see `Sampler`.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels, np.int32)
    if len(images) != len(labels) or images.shape[1:] != tuple(denoiser.sample_shape):
        raise UserError(
            f"Held-out data of shape {images.shape} with {len(labels)} labels do not fit a denoiser of states of shape "
            f"{denoiser.sample_shape}."
        )
    guidances = guidances if guidances is not None else {"plain": plain()}
    sampler = Sampler(
        denoiser,
        guidances,
        stepper=stepper if stepper is not None else Euler(),
        num_steps=num_steps,
        networks=networks,
        corrections=corrections,
        estimator=guiding_estimator,
        observer=AnswerObserver(estimator.posterior, num_nodes),
        observer_params=estimator.params,
        observe_times=times,
    )
    process, observed_times = denoiser.process, sampler.observed_times
    if calibration is None:
        calibration = calibrate(estimator, process, images, seed=seed, batch_size=batch_size, num_nodes=num_nodes)
    forward = forward_answers(
        estimator, process, images, observed_times, seed=seed, batch_size=batch_size, num_nodes=num_nodes
    )
    num_samples = len(labels) if num_samples is None else num_samples
    return {
        name: compare_answers(
            observed_times,
            _sampled_answers(sampler, name, labels, num_samples, min(batch_size, num_samples), seed),
            forward,
            calibration,
            seed=seed,
            level=level,
            num_resamples=num_resamples,
        )
        for name in guidances
    }


def _sampled_answers(
    sampler: Sampler, name: str, labels: np.ndarray, num_samples: int, batch_size: int, seed: int
) -> Answers:
    """Answers [T, num_samples] on the states of samples 0, 1, ...; sample i has label i modulo the number of labels."""
    parts = []
    for first in range(0, num_samples, batch_size):
        # The last batch is filled up with further samples that are dropped again: one shape, one program.
        indices = np.arange(first, first + batch_size)
        answers = sampler(name, labels[indices % len(labels)], seed=seed, indices=indices).observations
        parts.append([np.asarray(leaf, np.float64) for leaf in answers])
    return Answers(*(np.concatenate(leaves, axis=1)[:, :num_samples] for leaves in zip(*parts, strict=True)))


def resampled_means(answers: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `answers` [T, N] over N, then of resamples with replacement: [1 + num_resamples, T]."""
    by_sample = np.ascontiguousarray(answers.T)
    count = len(by_sample)
    means = [by_sample.mean(axis=0)]
    means += [by_sample[rng.integers(count, size=count)].mean(axis=0) for _ in range(num_resamples)]
    return np.stack(means)


def _shift_to_json(shift: ShiftAtTime) -> dict[str, Any]:
    return {
        name: value.to_json() if isinstance(value, Interval) else _number_or_none(value)
        for name, value in ((field.name, getattr(shift, field.name)) for field in dataclasses.fields(shift))
    }


def _number_or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
