"""Corrections: changes of a guided prediction that are no linear mixture of network outputs.

A correction has weights per time, prepared on the host, and a pure `update` that runs inside the compiled program. The
weights are data, so a sweep over them compiles once. Linear mixtures are guidances (`guidance.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.diffusion.guidance import check_weight
from nag_jax.diffusion.stepping import GuidedPrediction
from nag_jax.diffusion.time_posterior import TimePosterior


class Correction(Protocol):
    """What the sampler needs of a correction of the prediction."""

    def weights(self, times: np.ndarray) -> np.ndarray:
        """Weight at each of the host times [R]; a row with weight 0 skips the correction and its cost."""
        ...

    @staticmethod
    def update(
        prediction: GuidedPrediction, weight: jax.Array, posterior: TimePosterior, posterior_params: Any
    ) -> jax.Array:
        """The corrected prediction value [B, ...]."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassifierNAG:
    """Classifier-based NAG: s + nag_scale * grad_x log p(t|x) from a time posterior (arXiv 2510.12497).

    With the exact posterior it equals classifier-free NAG with the exact marginal score, for
    grad_x log p(t|x) = s(x|t) - s(x).

    Attributes:
        nag_scale: the paper's w, off at 0.
        interval: times at which it acts.
    """

    nag_scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_weight(self.nag_scale, self.interval)

    def weights(self, times: np.ndarray) -> np.ndarray:
        lowest, highest = self.interval
        return np.where((times >= lowest) & (times <= highest), self.nag_scale, 0.0)

    @staticmethod
    def update(
        prediction: GuidedPrediction, weight: jax.Array, posterior: TimePosterior, posterior_params: Any
    ) -> jax.Array:
        def total_log_density(x: jax.Array) -> jax.Array:
            # Samples are independent, so the gradient of the sum holds each sample's own gradient.
            return jnp.sum(posterior.log_density(posterior_params, x, prediction.t))

        score_difference = weight * jax.grad(total_log_density)(prediction.x)
        return prediction.value + prediction.process.score_difference(
            score_difference, prediction.t, prediction.kind
        )
