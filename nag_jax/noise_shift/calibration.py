"""What an estimator answers on average at each true noise level, and the level that an average answer stands for.

An estimator that is trained on a finite budget has a bias of its own and shrinks towards the prior mean, so its average
answer m(t) = E[g(x_t)] is not t. The inverse of m undoes that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from nag_jax.diffusion.process import Process
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.noise_shift.answers import NUM_NODES, forward_answers

NUM_CALIBRATION_TIMES = 25


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Answers on held-out forward states, by true time.

    Attributes:
        times: [K], strictly increasing, at least 2.
        means: [K], m(t): the mean answer at each time, as measured.
        deviations: [K], the standard deviation of single answers at each time.
    """

    times: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) < 2 or not len(self.times) == len(self.means) == len(self.deviations):
            raise UserError("A calibration needs a mean and a deviation at each of at least 2 times.")
        if np.any(np.diff(self.times) <= 0.0):
            raise UserError("The times of a calibration must strictly increase.")

    def level(self, mean_answer: np.ndarray) -> np.ndarray:
        """The inverse m^-1: the true time at which the mean answer is `mean_answer`, of the same shape.

        m is made non-decreasing by isotonic regression. Where that pools neighbouring times into one value, the
        inverse is their mean time; in between it is linear, and beyond the ends it goes on with the slope of the last
        piece, as far as 0 or 1. NaN if m rises nowhere: such an estimator tells nothing.
        """
        answers = np.asarray(mean_answer, np.float64)
        fit = isotonic_regression(np.asarray(self.means))
        values = fit.x[fit.blocks[:-1]]
        times = np.add.reduceat(np.asarray(self.times), fit.blocks[:-1]) / np.diff(fit.blocks)
        if len(values) < 2:
            return np.full_like(answers, np.nan)
        piece = np.clip(np.searchsorted(values, answers) - 1, 0, len(values) - 2)
        fraction = (answers - values[piece]) / (values[piece + 1] - values[piece])
        return np.clip(times[piece] + fraction * (times[piece + 1] - times[piece]), 0.0, 1.0)

    def to_json(self) -> dict[str, list[float]]:
        """The calibration as plain lists."""
        return {name: list(values) for name, values in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError if `values` is something else."""
        return Calibration(
            *(tuple(float(value) for value in values[name]) for name in ("times", "means", "deviations"))
        )


def calibrate(
    estimator: Estimator,
    process: Process,
    images: np.ndarray,
    *,
    seed: int,
    times: np.ndarray | None = None,
    batch_size: int = 256,
    num_nodes: int = NUM_NODES,
) -> Calibration:
    """Measures m(t) on held-out data.

    An image keeps its noise at all times, so the sampling error hardly bends m. The noise is another than that of the
    control in a measurement with the same seed.

    Args:
        estimator: what is calibrated.
        process: the noising process.
        images: held-out data, float32 [N, ...].
        seed: of the noise.
        times: [K], strictly increasing, in [0, 1]; default 25 of `process.levels`.
        batch_size: images per call.
        num_nodes: quadrature nodes of a posterior that is not Gaussian.

    Returns:
        The calibration.
    """
    times = process.levels(NUM_CALIBRATION_TIMES) if times is None else np.asarray(times, np.float64)
    answers = forward_answers(
        estimator,
        process,
        images,
        times,
        seed=seed,
        stream="noise_shift_calibration",
        batch_size=batch_size,
        num_nodes=num_nodes,
    ).mean
    means, deviations = answers.mean(axis=1), answers.std(axis=1)
    return Calibration(tuple(times.tolist()), tuple(means.tolist()), tuple(deviations.tolist()))
