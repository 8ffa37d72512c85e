"""Steppers: how a state moves from one time to the next, given a prediction and never a model.

A stepper prepares its rows on the host (`schedule`): one row per network evaluation, with the time of the evaluation
and the coefficients of the update in float64. Inside the compiled program `sampler.py` asks `state(carry)` for the
state to be predicted and hands the guided prediction to `advance`. All draws of noise are made by the sampler.

A row holds "t" (time of the evaluation), "start" (1.0 if the state at this row is a state of the path, 0.0 if it is
only a stage of a step) and what the stepper's own `advance` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.diffusion.ancestral import AncestralCoefficients, ancestral_coefficients
from nag_jax.diffusion.process import PredictionKind, Process
from nag_jax.errors import UserError

Rows: TypeAlias = dict[str, np.ndarray]
Row: TypeAlias = Mapping[str, jax.Array]


class GuidedPrediction(NamedTuple):
    """A prediction together with the state and time that it was made at, so that it can be read as any kind.

    Attributes:
        process: the process.
        kind: what `value` is.
        x: states [B, ...].
        t: times [B].
        value: [B, ...].
        variance: learned variance interpolation [B, ...] or None.
    """

    process: Process
    kind: PredictionKind
    x: jax.Array
    t: jax.Array
    value: jax.Array
    variance: jax.Array | None

    def read_as(self, kind: PredictionKind) -> jax.Array:
        """The prediction as `kind`, [B, ...]."""
        return self.process.convert(self.value, self.x, self.t, self.kind, kind)


class Stepper(Protocol):
    """What the sampler needs of a stepper. Frozen and hashable: a static argument of compiled programs."""

    @property
    def is_stochastic(self) -> bool:
        """Whether `advance` reads noise; none is drawn otherwise."""
        ...

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        """The kinds that `advance` reads, so that impossible conversions are refused before anything runs."""
        ...

    def schedule(self, process: Process, num_steps: int) -> Rows:
        """The rows of `num_steps` steps: arrays [R], float64."""
        ...

    def init(self, x: jax.Array) -> Any:
        """The carry that starts at states `x` [B, ...]."""
        ...

    def state(self, carry: Any) -> jax.Array:
        """The states to be predicted next, and after the last row the samples: [B, ...]."""
        ...

    def advance(self, carry: Any, prediction: GuidedPrediction, row: Row, noise: jax.Array | None) -> Any:
        """One row of the update; `noise` is standard normal [B, ...], or None for a deterministic stepper."""
        ...


class SingleStep:
    """A stepper that remembers nothing but the state: the carry is the state."""

    def init(self, x: jax.Array) -> jax.Array:
        return x

    def state(self, carry: jax.Array) -> jax.Array:
        return carry


@dataclasses.dataclass(frozen=True)
class Euler(SingleStep):
    """Euler's method on the probability-flow ODE, in the variables in which the process is regular.

    On the linear and GVP paths these are x and t, dx = v dt. On the DDPM process they are x/alpha and sigma/alpha,
    where one Euler step is one DDIM step (arXiv 2010.02502, equation 12).

    Attributes:
        t_max, t_min: ends of the grid, 0 <= t_min < t_max <= 1.
    """

    t_max: float = 1.0
    t_min: float = 0.0
    is_stochastic: ClassVar[bool] = False

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return (process.ode_kind,)

    def schedule(self, process: Process, num_steps: int) -> Rows:
        return _ode_rows(process, process.time_grid(num_steps, self.t_max, self.t_min))

    def advance(
        self, carry: jax.Array, prediction: GuidedPrediction, row: Row, noise: jax.Array | None
    ) -> jax.Array:
        slope = prediction.read_as(prediction.process.ode_kind)
        return row["scale_ratio"] * carry + row["slope"] * slope


class HeunCarry(NamedTuple):
    """State at the start of the step, its slope, and the state to be predicted next."""

    start: jax.Array
    slope: jax.Array
    x: jax.Array


@dataclasses.dataclass(frozen=True)
class Heun:
    """Heun's second-order method in the same variables as `Euler`; two evaluations a step, one for the last.

    The last step is an Euler step, for no network is asked at its end (as in arXiv 2206.00364, algorithm 1).

    Attributes:
        t_max, t_min: ends of the grid, 0 <= t_min < t_max <= 1.
    """

    t_max: float = 1.0
    t_min: float = 0.0
    is_stochastic: ClassVar[bool] = False

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return (process.ode_kind,)

    def schedule(self, process: Process, num_steps: int) -> Rows:
        grid = process.time_grid(num_steps, self.t_max, self.t_min)
        steps = _ode_rows(process, grid)
        rows = {name: np.repeat(values, 2)[:-1] for name, values in steps.items()}
        rows["t"][1::2] = steps["t_next"][:-1]
        rows["start"][1::2] = 0.0
        return rows

    def init(self, x: jax.Array) -> HeunCarry:
        return HeunCarry(x, jnp.zeros_like(x), x)

    def state(self, carry: HeunCarry) -> jax.Array:
        return carry.x

    def advance(
        self, carry: HeunCarry, prediction: GuidedPrediction, row: Row, noise: jax.Array | None
    ) -> HeunCarry:
        slope = prediction.read_as(prediction.process.ode_kind)
        is_first = row["start"] > 0.5
        mean_slope = jnp.where(is_first, slope, 0.5 * (carry.slope + slope))
        x = row["scale_ratio"] * carry.start + row["slope"] * mean_slope
        return HeunCarry(jnp.where(is_first, carry.start, x), slope, x)


def _ode_rows(process: Process, grid: np.ndarray) -> Rows:
    """x_next = scale_ratio x + slope dy/d(ode_time), from y = x / ode_scale."""
    t, t_next = grid[:-1], grid[1:]
    scale_next = process.ode_scale(t_next)
    return {
        "t": t,
        "t_next": t_next,
        "start": np.ones_like(t),
        "scale_ratio": scale_next / process.ode_scale(t),
        "slope": scale_next * (process.ode_time(t_next) - process.ode_time(t)),
    }


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(SingleStep):
    """Euler-Maruyama on the reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW with w = 2 sigma, SiT's sampler.

    The grid is linspace(1, last_step, num_steps); the last evaluation makes a step of `last_step` along the mean, with
    no noise (arXiv 2401.08740 and its public code: 249 noisy steps and one mean step).

    Attributes:
        last_step: length of the last, noiseless step, in (0, 1).
        t_max: start of the grid.
    """

    last_step: float = 0.04
    t_max: float = 1.0
    is_stochastic: ClassVar[bool] = True

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ("velocity", "noise")

    def schedule(self, process: Process, num_steps: int) -> Rows:
        if num_steps < 2 or not 0.0 < self.last_step < self.t_max:
            raise UserError(
                f"Euler-Maruyama needs num_steps >= 2 and 0 < last_step < t_max, got num_steps = {num_steps}, "
                f"last_step = {self.last_step:g}, t_max = {self.t_max:g}."
            )
        t = np.linspace(self.t_max, self.last_step, num_steps)
        t_next = np.append(t[1:], 0.0)
        noise = np.sqrt(2.0 * process.sigma(t) * (t - t_next))
        noise[-1] = 0.0
        return {"t": t, "t_next": t_next, "start": np.ones_like(t), "step": t_next - t, "noise": noise}

    def advance(
        self, carry: jax.Array, prediction: GuidedPrediction, row: Row, noise: jax.Array | None
    ) -> jax.Array:
        assert noise is not None  # is_stochastic
        # w/2 score = sigma (-eps / sigma) = -eps, which stays regular as sigma -> 0.
        drift = prediction.read_as("velocity") + prediction.read_as("noise")
        return carry + row["step"] * drift + row["noise"] * noise


@dataclasses.dataclass(frozen=True)
class DDIM(SingleStep):
    """DDIM, x_next = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z (arXiv 2010.02502, equation 12).

    Attributes:
        eta: s is eta times the ancestral standard deviation, eta >= 0; 0 is deterministic, 1 has DDPM's noise.
        t_max, t_min: ends of the grid.
    """

    eta: float = 0.0
    t_max: float = 1.0
    t_min: float = 0.0

    def __post_init__(self) -> None:
        if not self.eta >= 0.0:
            raise UserError(f"DDIM's eta = {self.eta:g} must not be negative.")

    @property
    def is_stochastic(self) -> bool:
        return self.eta > 0.0

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ("data", "noise")

    def schedule(self, process: Process, num_steps: int) -> Rows:
        grid = process.time_grid(num_steps, self.t_max, self.t_min)
        t, t_next = grid[:-1], grid[1:]
        deviation = self.eta * np.exp(0.5 * ancestral_coefficients(process, t, t_next).log_variance_min)
        sigma_next = process.sigma(t_next)
        if np.any(deviation > sigma_next):
            raise UserError(f"eta = {self.eta:g} adds more noise than the next level holds. Use eta <= 1.")
        return {
            "t": t,
            "t_next": t_next,
            "start": np.ones_like(t),
            "data": process.alpha(t_next),
            "prediction_noise": np.sqrt(sigma_next**2 - deviation**2),
            "noise": deviation,
        }

    def advance(
        self, carry: jax.Array, prediction: GuidedPrediction, row: Row, noise: jax.Array | None
    ) -> jax.Array:
        x = row["data"] * prediction.read_as("data") + row["prediction_noise"] * prediction.read_as("noise")
        return x if noise is None else x + row["noise"] * noise


@dataclasses.dataclass(frozen=True)
class Ancestral(SingleStep):
    """DDPM's ancestral sampler: x_next ~ q(x_next | x, x_0) with the learned variance where the network has one.

    Attributes:
        variance: "learned" interpolates between the smallest and the largest log variance with the network's second
            output (Nichol & Dhariwal 2021, equation 15), "small" and "large" take the ends.
        t_max, t_min: ends of the grid.
    """

    variance: str = "small"
    t_max: float = 1.0
    t_min: float = 0.0
    is_stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in ("learned", "small", "large"):
            raise UserError(f"Ancestral variance = {self.variance!r} is not one of learned, small, large.")

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ("data",)

    def schedule(self, process: Process, num_steps: int) -> Rows:
        grid = process.time_grid(num_steps, self.t_max, self.t_min)
        t, t_next = grid[:-1], grid[1:]
        coefficients = ancestral_coefficients(process, t, t_next)
        # A step to clean data is its mean: its posterior variance is 0, and a finite logarithm stands in for log 0.
        is_noisy = process.sigma(t_next) > 0.0
        log_variance_min = np.where(is_noisy, coefficients.log_variance_min, coefficients.log_variance_max)
        return {
            "t": t,
            "t_next": t_next,
            "start": np.ones_like(t),
            "is_noisy": is_noisy.astype(np.float64),
            **coefficients._replace(log_variance_min=log_variance_min)._asdict(),
        }

    def advance(
        self, carry: jax.Array, prediction: GuidedPrediction, row: Row, noise: jax.Array | None
    ) -> jax.Array:
        coefficients = AncestralCoefficients(**{name: row[name] for name in AncestralCoefficients._fields})
        if self.variance == "learned":
            if prediction.variance is None:
                raise UserError("Ancestral(variance='learned') needs a network with learned variance.")
            log_variance = coefficients.log_variance(prediction.variance)
        else:
            log_variance = coefficients.log_variance(1.0 if self.variance == "large" else -1.0)
        assert noise is not None  # is_stochastic
        mean = coefficients.x * carry + coefficients.data * prediction.read_as("data")
        return mean + row["is_noisy"] * jnp.exp(0.5 * log_variance) * noise


class MultistepCarry(NamedTuple):
    """State and the previous step's x_0."""

    x: jax.Array
    previous_data: jax.Array


@dataclasses.dataclass(frozen=True)
class DPMSolverPlusPlus:
    """DPM-Solver++(2M), deterministic, one evaluation a step (arXiv 2211.01095, algorithm 2).

    The first step is of first order, and so is a step whose half log-SNR has no finite value at one of its ends.

    Attributes:
        t_max, t_min: ends of the grid.
    """

    t_max: float = 1.0
    t_min: float = 0.0
    is_stochastic: ClassVar[bool] = False

    def needs(self, process: Process) -> tuple[PredictionKind, ...]:
        return ("data",)

    def schedule(self, process: Process, num_steps: int) -> Rows:
        grid = process.time_grid(num_steps, self.t_max, self.t_min)
        t, t_next = grid[:-1], grid[1:]
        step = 0.5 * np.diff(process.log_snr(grid))
        # D = x_0 + extrapolation (x_0 - previous x_0), extrapolation = 1 / (2 r) with r = previous step / this step.
        extrapolation = np.zeros_like(t)
        is_second_order = np.isfinite(step[1:]) & np.isfinite(step[:-1])
        extrapolation[1:][is_second_order] = 0.5 * step[1:][is_second_order] / step[:-1][is_second_order]
        x = process.sigma(t_next) / process.sigma(t)
        return {
            "t": t,
            "t_next": t_next,
            "start": np.ones_like(t),
            "x": x,
            # -alpha' (exp(-h) - 1), written so that it holds where h is infinite.
            "data": process.alpha(t_next) - process.alpha(t) * x,
            "extrapolation": extrapolation,
        }

    def init(self, x: jax.Array) -> MultistepCarry:
        return MultistepCarry(x, jnp.zeros_like(x))

    def state(self, carry: MultistepCarry) -> jax.Array:
        return carry.x

    def advance(
        self, carry: MultistepCarry, prediction: GuidedPrediction, row: Row, noise: jax.Array | None
    ) -> MultistepCarry:
        data = prediction.read_as("data")
        extrapolated = data + row["extrapolation"] * (data - carry.previous_data)
        return MultistepCarry(row["x"] * carry.x + row["data"] * extrapolated, data)


STEPPERS: dict[str, Stepper] = {
    "euler": Euler(),
    "heun": Heun(),
    "euler_maruyama": EulerMaruyama(),
    "ddim": DDIM(),
    "ddpm": Ancestral(),
    "ddpm_learned": Ancestral(variance="learned"),
    "dpm_solver_pp_2m": DPMSolverPlusPlus(),
}


def make_stepper(name: str) -> Stepper:
    """The stepper that a config names. Raises UserError for an unknown name."""
    if name not in STEPPERS:
        raise UserError(f"sampling.stepper = {name!r} is not a stepper. Known: {', '.join(STEPPERS)}.")
    return STEPPERS[name]
