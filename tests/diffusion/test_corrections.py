"""Classifier-based Noise Awareness Guidance against its closed forms, and when corrections run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.denoiser import Denoiser, from_function
from nag_jax.diffusion.analytic import Mixture, make_mixture
from nag_jax.diffusion.corrections import ClassifierNAG
from nag_jax.diffusion.guidance import Guidance, nag, plain
from nag_jax.diffusion.process import DDPM, PREDICTION_KINDS, Linear, PredictionKind, Process
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import Euler, GuidedPrediction
from nag_jax.diffusion.time_posterior import SMALLEST_NODE, Estimator, GaussianTimePosterior
from nag_jax.errors import UserError

START = np.random.default_rng(0).normal(size=(3, 1, 2, 1))
NUM_LEVELS = 12


def draw(denoiser: Denoiser, guidance: Guidance, **options: Any) -> np.ndarray:
    stepper = Euler(t_max=0.9, t_min=0.1)
    sampler = Sampler(denoiser, {"mine": guidance}, **({"stepper": stepper, "num_steps": 5} | options))
    return np.asarray(sampler("mine", np.zeros(3, np.int32), seed=0, indices=np.arange(3), initial=START).x)


def one_class(process: Process) -> Mixture:
    means = np.array([[-0.5, 0.2], [0.6, -0.1]]).reshape(2, 1, 2, 1)
    return make_mixture(process, means, covariances=[0.2, 0.3], levels=process.levels(NUM_LEVELS))


# --- The two forms of Noise Awareness Guidance ---


@pytest.mark.parametrize(
    ("process", "kind", "enable_x64", "tolerance"),
    [(Linear(), "velocity", True, 1e-8), (DDPM(), "noise", True, 1e-8), (Linear(), "velocity", False, 1e-5)],
    ids=["linear", "ddpm", "linear float32"],
)
def test_classifier_based_equals_classifier_free_with_the_true_score(
    process: Process, kind: PredictionKind, enable_x64: bool, tolerance: float
) -> None:
    # grad_x log p(t|x) = s(x|t) - s(x), and a quadrature with every level is exact.
    mixture, w = one_class(process), 0.4
    with jax.enable_x64(enable_x64):
        denoiser, estimator = mixture.denoiser(kind), Estimator(*mixture.time_posterior())
        free = draw(denoiser, nag(w, null="posterior"), estimator=estimator, num_posterior_nodes=NUM_LEVELS)
        based = draw(denoiser, plain(), corrections=[ClassifierNAG(w)], estimator=estimator)
        unguided = draw(denoiser, plain(), corrections=[ClassifierNAG(0.0)], estimator=estimator)
    np.testing.assert_allclose(based, free, rtol=tolerance, atol=tolerance)
    assert np.abs(based - unguided).max() > 1e-2


# --- A Gaussian estimator ---

SLOPE, LOG_VARIANCE = 0.2, math.log(0.05)


def linear_estimate(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean 0.5 + slope * sum of x, and a variance that depends on the state as well."""
    total = jnp.sum(x, axis=tuple(range(1, x.ndim)))
    return 0.5 + params["slope"] * total, LOG_VARIANCE + params["spread"] * total


def estimator(slope: float = SLOPE, spread: float = 0.0) -> Estimator:
    return Estimator(GaussianTimePosterior(linear_estimate), {"slope": slope, "spread": spread})


@pytest.mark.parametrize("kind", PREDICTION_KINDS)
def test_correction_is_the_gradient_in_the_kind_of_the_prediction(kind: PredictionKind) -> None:
    process, w = Linear(), 1.5
    t = np.array([0.2, 0.6, 0.95])
    with jax.enable_x64(True):
        value = jnp.asarray(np.random.default_rng(1).normal(size=START.shape))
        prediction = GuidedPrediction(process, kind, jnp.asarray(START), jnp.asarray(t), value, None)
        theirs = estimator()
        corrected = ClassifierNAG.update(prediction, jnp.asarray(w), theirs.posterior, theirs.params)
        added = np.asarray(corrected - value)
    residual = t - 0.5 - SLOPE * START.sum(axis=(1, 2, 3))
    score = w * SLOPE * residual / math.exp(LOG_VARIANCE)
    # On the linear path: ds, -t ds, t^2 / (1 - t) ds and -t / (1 - t) ds.
    factor = {"score": 1.0 + 0 * t, "noise": -t, "data": t**2 / (1 - t), "velocity": -t / (1 - t)}[kind]
    np.testing.assert_allclose(added, np.broadcast_to((factor * score)[:, None, None, None], START.shape), rtol=1e-10)


def test_gradient_includes_the_variance_of_the_estimate() -> None:
    t, spread = np.array([0.2, 0.6, 0.9]), 0.3
    with jax.enable_x64(True):
        x = jnp.asarray(START)
        prediction = GuidedPrediction(Linear(), "score", x, jnp.asarray(t), jnp.zeros_like(x), None)
        theirs = estimator(spread=spread)
        score = np.asarray(ClassifierNAG.update(prediction, jnp.asarray(1.0), theirs.posterior, theirs.params))
    total = START.sum(axis=(1, 2, 3))
    residual, precision = t - 0.5 - SLOPE * total, np.exp(-LOG_VARIANCE - spread * total)
    expected = SLOPE * residual * precision + 0.5 * spread * (residual**2 * precision - 1.0)
    np.testing.assert_allclose(score[:, 0, 0, 0], expected, rtol=1e-10)


def test_gaussian_quadrature_is_exact_for_polynomials() -> None:
    mean, deviation = 0.5, 0.05
    posterior = GaussianTimePosterior(lambda params, x: (jnp.full(3, mean), jnp.full(3, 2 * math.log(deviation))))
    with jax.enable_x64(True):
        nodes, weights = map(np.asarray, posterior.quadrature(None, jnp.asarray(START), 4))
    assert nodes.shape == weights.shape == (4, 3)
    np.testing.assert_allclose(np.sum(weights, axis=0), 1.0, rtol=1e-12)
    for degree, moment in {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 6: 15.0, 7: 0.0}.items():
        got = np.sum(weights * (nodes - mean) ** degree, axis=0)
        np.testing.assert_allclose(got, moment * deviation**degree, rtol=1e-10, atol=1e-16)


def test_gaussian_density_and_the_range_of_its_nodes() -> None:
    posterior = GaussianTimePosterior(lambda params, x: (jnp.array([0.0, 0.5, 1.0]), jnp.full(3, math.log(0.09))))
    x = jnp.asarray(START, jnp.float32)
    nodes, weights = posterior.quadrature(None, x, 5)
    assert nodes.min() == np.float32(SMALLEST_NODE) and nodes.max() == 1.0
    np.testing.assert_allclose(np.sum(weights, axis=0), 1.0, rtol=1e-6)
    t = np.linspace(-3.0, 4.0, 2001)
    density = np.exp([np.asarray(posterior.log_density(None, x, jnp.full(3, time))) for time in t[::50]])
    np.testing.assert_allclose(np.trapezoid(density, t[::50], axis=0), 1.0, rtol=1e-3)


# --- When corrections run ---


def zero(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


ZERO = from_function(zero, Linear(), "velocity", num_classes=1, sample_shape=(1, 2, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class CountedPosterior:
    """A posterior that records its traces and executions."""

    traces: list[None] = dataclasses.field(default_factory=list)
    times: list[float] = dataclasses.field(default_factory=list)

    def log_density(self, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        self.traces.append(None)
        jax.debug.callback(lambda t: self.times.append(round(float(t[0]), 3)), t)
        return jnp.sum(params * x, axis=(1, 2, 3))

    def quadrature(self, params: Any, x: jax.Array, num_nodes: int) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError


def test_rows_outside_the_interval_cost_nothing_and_sweeps_compile_once() -> None:
    posterior = CountedPosterior()
    times = [0.9, 0.74, 0.58, 0.42, 0.26]
    plain_x, traces = draw(ZERO, plain()), None
    for scale, interval, expected in (
        (0.5, (0.3, 0.8), [0.74, 0.58, 0.42]),
        (-1.0, (0.0, 1.0), times),
        (1.0, (0.0, 0.3), [0.26]),
        (0.0, (0.0, 1.0), []),
        (1.0, (0.95, 1.0), []),
    ):
        x = draw(ZERO, plain(), corrections=[ClassifierNAG(scale, interval)], estimator=Estimator(posterior, 1.0))
        jax.effects_barrier()
        assert posterior.times == expected
        posterior.times.clear()
        # grad log p = 1, so v gains -t / (1 - t) w in each row, and each of five Euler steps is 0.16 long.
        moved = sum(0.16 * scale * t / (1 - t) for t in expected)
        np.testing.assert_allclose(x, plain_x + moved, rtol=1e-5, atol=1e-6)
        traces = traces or len(posterior.traces)
        assert len(posterior.traces) == traces


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiplies the prediction by 1 + weight."""

    amount: float

    def weights(self, times: np.ndarray) -> np.ndarray:
        return np.full(len(times), self.amount)

    @staticmethod
    def update(prediction: GuidedPrediction, weight: jax.Array, posterior: Any, posterior_params: Any) -> jax.Array:
        return (1.0 + weight) * prediction.value


@dataclasses.dataclass(frozen=True)
class Shift(Scale):
    """Adds the weight to the prediction."""

    @staticmethod
    def update(prediction: GuidedPrediction, weight: jax.Array, posterior: Any, posterior_params: Any) -> jax.Array:
        return prediction.value + weight


@pytest.mark.parametrize(
    ("corrections", "velocity"), [([Scale(1.0), Shift(0.5)], 0.5), ([Shift(0.5), Scale(1.0)], 1.0)], ids=["a", "b"]
)
def test_corrections_apply_in_order(corrections: list[Any], velocity: float) -> None:
    x = draw(ZERO, plain(), corrections=corrections, estimator=estimator())
    np.testing.assert_allclose(x, START - 0.8 * velocity, rtol=1e-5, atol=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="estimator"):
        draw(ZERO, plain(), corrections=[ClassifierNAG(1.0)])
    with pytest.raises(UserError, match="interval"):
        ClassifierNAG(1.0, interval=(0.8, 0.3))
    with pytest.raises(UserError, match="finite"):
        ClassifierNAG(math.nan)
