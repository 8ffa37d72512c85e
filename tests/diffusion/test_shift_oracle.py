"""The noise shift of a sampler whose score is wrong by a known factor, against the equations of that sampler.

Data N(0, DATA_VARIANCE) in every dimension, score times 1 + eta. Without guidance the states' variance obeys a scalar
equation with a closed form; with Noise Awareness Guidance the squared radius of every state obeys an ordinary
differential equation. The sampler must agree with both, and so must the shift that the exact posterior measures.
Whether guidance reduces the shift is printed over w and eta (`pytest -s`), and asserted only as the equation has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chi2

from nag_jax.denoiser import Denoiser, Prediction
from nag_jax.diffusion.analytic import make_mixture
from nag_jax.diffusion.analytic_gaussian import perturbed_radius, perturbed_variance
from nag_jax.diffusion.guidance import nag, plain
from nag_jax.diffusion.process import DDPM, GVP, Linear, PredictionKind, Process, expand_like
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import Heun
from nag_jax.diffusion.time_posterior import Estimator

DATA_VARIANCE, SHAPE = 0.1, (2, 2, 4)
DIMENSION = int(np.prod(SHAPE))
NUM_LEVELS = 32
SCORE_ERRORS = (-0.1, -0.05, 0.05, 0.1)
NAG_SCALES = (0.1, 0.3, 1.0)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class WrongScore:
    """(1 + error) times the exact score, as `prediction`; without the noise level, its average over p(t | x)."""

    process: Process
    prediction: PredictionKind

    def __call__(
        self, params: Any, x: Any, t: Any, labels: Any, drop_label: Any, drop_noise: Any, offset: Any
    ) -> Prediction:
        levels = jnp.asarray(self.process.levels(NUM_LEVELS))
        variance = self.variance(levels)
        squared = jnp.sum(x**2, axis=(1, 2, 3))
        log_density = -0.5 * (squared[:, None] / variance + DIMENSION * jnp.log(variance))
        null = jax.nn.softmax(log_density, axis=1) @ self.factor(levels, params["error"])
        return Prediction(expand_like(jnp.where(drop_noise, null, self.factor(t, params["error"])), x) * x)

    def variance(self, t: Any) -> Any:
        return self.process.alpha(t) ** 2 * DATA_VARIANCE + self.process.sigma(t) ** 2

    def factor(self, t: Any, error: Any) -> Any:
        """The prediction is this times x."""
        a, b = self.process.conversion(t, "score", self.prediction)
        return a - b * (1.0 + error) / self.variance(t)


@dataclasses.dataclass(frozen=True)
class Observe:
    """Squared radius, and the exact posterior's mean of t."""

    posterior: Any

    def __call__(self, params: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        nodes, weights = self.posterior.quadrature(params, x, NUM_LEVELS)
        return jnp.sum(x**2, axis=(1, 2, 3)), jnp.sum(nodes * weights, axis=0)


def wrong_denoiser(process: Process, prediction: PredictionKind, error: float) -> Denoiser:
    return Denoiser(WrongScore(process, prediction), {"error": np.float64(error)}, process, prediction, 1, SHAPE)


def true_variance(process: Process, t: Any) -> Any:
    return process.alpha(t) ** 2 * DATA_VARIANCE + process.sigma(t) ** 2


def starts(process: Process, t: float) -> np.ndarray:
    """Three states in directions of their own, with the radii of true states in the middle of three equal parts."""
    direction = np.random.default_rng(0).normal(size=(3, *SHAPE))
    direction /= np.sqrt((direction**2).sum(axis=(1, 2, 3), keepdims=True))
    squared = true_variance(process, np.float64(t)) * chi2.ppf([1 / 6, 1 / 2, 5 / 6], DIMENSION)
    return direction * np.sqrt(squared).reshape(3, 1, 1, 1)


def posterior_mean_of_t(process: Process, squared_radius: np.ndarray) -> np.ndarray:
    """E[t | x], a function of the radius alone, written out."""
    levels = process.levels(NUM_LEVELS)
    variance = true_variance(process, levels)
    log_density = -0.5 * (squared_radius[..., None] / variance + DIMENSION * np.log(variance))
    return softmax(log_density, axis=-1) @ levels


# Away from the ends; on DDPM, where sigma / alpha is moderate.
RANGES = {"linear": (0.9, 0.1), "gvp": (0.9, 0.1), "ddpm": (0.6, 0.05)}


def squared_states(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    return x**2


@pytest.mark.parametrize("process", [Linear(), GVP(), DDPM()], ids=lambda process: process.name)
def test_variance_without_guidance_obeys_its_scalar_equation(process: Process) -> None:
    t_max, t_min = RANGES[process.name]
    stepper = Heun(t_max=t_max, t_min=t_min)
    x = starts(process, t_max)
    for error in (0.0, *SCORE_ERRORS):
        sampler = Sampler(
            wrong_denoiser(process, "score", error),
            {"plain": plain()},
            stepper=stepper,
            num_steps=150,
            observer=squared_states,
        )
        result = sampler("plain", np.zeros(3, np.int32), seed=0, indices=np.arange(3), initial=x)
        times = np.append(result.times, t_min)
        squares = np.concatenate([np.asarray(result.observations), np.asarray(result.x)[None] ** 2])
        # Such a sampler multiplies every state by the same factor, so this is the variance of any set of states.
        growth = squares / squares[0]
        expected = perturbed_variance(process, DATA_VARIANCE, error, times)
        for moved in growth.reshape(len(times), -1).T:
            np.testing.assert_allclose(moved, expected / expected[0], rtol=2e-3)


@pytest.mark.parametrize("prediction", ["score", "velocity"])
def test_shift_with_guidance_is_that_of_the_radius_equation(prediction: PredictionKind) -> None:
    # A network that predicts scores averages them over p(t | x) where its noise level is dropped, which gives the
    # true s~(x); one that predicts velocities averages those.
    process, times = Linear(), [0.9, 0.8, 0.6, 0.4, 0.2, 0.1]
    x = starts(process, times[0])
    radii = (x**2).sum(axis=(1, 2, 3))
    true_radii = radii * (true_variance(process, np.array(times)) / true_variance(process, 0.9))[:, None]
    control = posterior_mean_of_t(process, true_radii)

    mixture = make_mixture(process, np.zeros((1, *SHAPE)), covariances=DATA_VARIANCE, levels=process.levels(NUM_LEVELS))
    posterior, posterior_params = mixture.time_posterior()
    guidances = {0.0: plain()} | {w: nag(w) for w in NAG_SCALES}
    print(f"\nMean shift E[t | sampled] - E[t | true], null branch: {prediction}; * where NAG reduces it")
    print("  eta     w  " + "  ".join(f"t = {t:<5}" for t in times[1:]))
    for error in SCORE_ERRORS:
        sampler = Sampler(
            wrong_denoiser(process, prediction, error),
            {f"{w}": guidance for w, guidance in guidances.items()} | {"posterior": nag(0.3, null="posterior")},
            stepper=Heun(t_max=0.9, t_min=0.05),
            num_steps=340,
            estimator=Estimator(posterior, posterior_params),
            num_posterior_nodes=NUM_LEVELS,
            observer=Observe(posterior),
            observer_params=posterior_params,
            observe_times=times,
        )
        without: tuple[np.ndarray, np.ndarray] | None = None
        for w in guidances:
            result = sampler(f"{w}", np.zeros(3, np.int32), seed=0, indices=np.arange(3), initial=x)
            np.testing.assert_allclose(result.times, times, rtol=1e-9)
            sampled_radii, answers = (np.asarray(observed) for observed in result.observations)
            levels = process.levels(NUM_LEVELS)
            equation = np.stack(
                [
                    perturbed_radius(
                        process, DATA_VARIANCE, error, w, DIMENSION, r, times, levels, null_kind=prediction
                    )
                    for r in radii
                ],
                axis=1,
            )
            np.testing.assert_allclose(sampled_radii, equation, rtol=2e-3)
            measured = (answers - control).mean(axis=1)[1:]
            predicted = (posterior_mean_of_t(process, equation) - control).mean(axis=1)[1:]
            np.testing.assert_allclose(measured, predicted, atol=1e-3)

            without = without or (measured, predicted)
            reduction, predicted_reduction = (
                np.abs(plain_shift) - np.abs(shift)
                for plain_shift, shift in zip(without, (measured, predicted), strict=True)
            )
            marks = ["*" if value > 0 else " " for value in reduction]
            shifts = "  ".join(f"{shift:+.4f} {mark}" for shift, mark in zip(measured, marks, strict=True))
            print(f"{error:+.2f}  {w:4.1f}  {shifts}")
            is_clear = np.abs(predicted_reduction) > 2e-3
            np.testing.assert_array_equal(reduction[is_clear] > 0, predicted_reduction[is_clear] > 0)

        # Too small a score leaves too much noise in the states, too large a one too little.
        assert (np.sign(without[0]) == -np.sign(error)).all()
        # The posterior branch averages the network's scores, whatever it predicts: the true s~(x) of the equation.
        result = sampler("posterior", np.zeros(3, np.int32), seed=0, indices=np.arange(3), initial=x)
        equation = [perturbed_radius(process, DATA_VARIANCE, error, 0.3, DIMENSION, r, times, levels) for r in radii]
        np.testing.assert_allclose(result.observations[0], np.transpose(equation), rtol=2e-3)
