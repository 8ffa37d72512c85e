"""Noising processes x_t = alpha_t x_0 + sigma_t eps on one time axis, and every conversion between predictions.

t lies in [0, 1]; t = 0 is data and t = 1 is noise. This is the only place in nag_jax that knows alpha, sigma or how a
velocity, a noise, a data and a score prediction turn into each other. It holds no networks, no losses and no samplers.

Everything is affine in (x, prediction) with coefficients that depend on t alone, so functions of t take either a JAX
array (and return one, for use inside a compiled program) or a numpy value (and return float64, for rows that are
prepared on the host).

Equations, from x_t = alpha x_0 + sigma eps and v = alpha' x_0 + sigma' eps with D = alpha sigma' - alpha' sigma:
    (1) eps = (alpha v - alpha' x) / D        (2) x_0 = (sigma' x - sigma v) / D        (3) score = -eps / sigma
    (4) v = (alpha'/alpha) x + (D/alpha) eps   (5) v = (sigma'/sigma) x - (D/sigma) x_0
The linear path and DDPM are those of SiT (arXiv 2401.08740) and DiT (arXiv 2212.09748).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.errors import UserError

PredictionKind: TypeAlias = Literal["velocity", "noise", "data", "score"]
PREDICTION_KINDS: tuple[PredictionKind, ...] = ("velocity", "noise", "data", "score")

# A score difference turns into a velocity difference with a factor sigma/alpha, which has no limit where alpha = 0.
# Past this time of a continuous process that ratio stays what it is here (a choice of ours; the paper does not say).
LARGEST_REGULAR_TIME = 0.95


def array_module(t: Any) -> Any:
    """The array module that `t` belongs to: jax.numpy for JAX arrays and tracers, numpy (float64) for the rest."""
    return jnp if isinstance(t, jax.Array) else np


def expand_like(t: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes per-sample values `t` [B] (or a scalar) so that they broadcast against `x` [B, ...]."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


@dataclasses.dataclass(frozen=True)
class Process(abc.ABC):
    """A noising process. Frozen and hashable: a process is a static argument of compiled programs."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name under which `make_process` makes this process."""

    @property
    @abc.abstractmethod
    def num_levels(self) -> int | None:
        """Number of discrete noise levels that a network is trained at, or None where t is continuous."""

    @abc.abstractmethod
    def alpha(self, t: Any) -> Any:
        """Data coefficient alpha_t; same shape as `t`."""

    @abc.abstractmethod
    def sigma(self, t: Any) -> Any:
        """Noise coefficient sigma_t; same shape as `t`."""

    @abc.abstractmethod
    def alpha_dot(self, t: Any) -> Any:
        """d alpha / dt; same shape as `t`."""

    @abc.abstractmethod
    def sigma_dot(self, t: Any) -> Any:
        """d sigma / dt; same shape as `t`."""

    @abc.abstractmethod
    def time_of_sigma(self, sigma: Any) -> Any:
        """The t with sigma_t = `sigma`; NaN where the process has no such level."""

    @abc.abstractmethod
    def time_of_ratio(self, ratio: Any) -> Any:
        """The t with sigma_t / alpha_t = `ratio` (the same signal-to-noise ratio)."""

    def log_snr(self, t: Any) -> Any:
        """log(alpha^2 / sigma^2); +inf at clean data, -inf where no signal is left."""
        xp = array_module(t)
        with np.errstate(divide="ignore"):
            return 2.0 * (xp.log(self.alpha(t)) - xp.log(self.sigma(t)))

    def add_noise(self, x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t = alpha_t x_0 + sigma_t eps for x_0, noise [B, ...] and t [B]."""
        return expand_like(self.alpha(t), x_0) * x_0 + expand_like(self.sigma(t), x_0) * noise

    def velocity(self, x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """v_t = alpha'_t x_0 + sigma'_t eps for x_0, noise [B, ...] and t [B]."""
        return expand_like(self.alpha_dot(t), x_0) * x_0 + expand_like(self.sigma_dot(t), x_0) * noise

    def nearest_level(self, t: Any) -> Any:
        """Maps t in [0, 1) to a level that a network is trained at, so that uniform t gives uniform levels."""
        if self.num_levels is None:
            return t
        xp = array_module(t)
        return (xp.clip(xp.floor(t * self.num_levels), 0, self.num_levels - 1) + 1) / self.num_levels

    def levels(self, count: int) -> np.ndarray:
        """`count` levels spread over the training levels [count], ascending, float64: quadrature nodes for p(t).

        Continuous processes answer the midpoints of `count` equal bins, discrete ones a subset of their levels.
        """
        if self.num_levels is None:
            return (np.arange(count) + 0.5) / count
        return np.unique(np.round(np.linspace(0, self.num_levels - 1, count)).astype(int) + 1) / self.num_levels

    def time_grid(self, num_steps: int, t_max: float = 1.0, t_min: float = 0.0) -> np.ndarray:
        """The default sampling grid from `t_max` down to `t_min`: [num_steps + 1], float64, strictly decreasing.

        Continuous processes: evenly spaced. Raises UserError for fewer than one step or an empty range.
        """
        check_grid(num_steps, t_max, t_min)
        return np.linspace(t_max, t_min, num_steps + 1)

    # The variables in which the probability-flow ODE is regular: y = x / ode_scale, dy/d(ode_time) = `ode_kind`.
    @property
    def ode_kind(self) -> PredictionKind:
        """What the right-hand side of the probability-flow ODE is, in the variables of this process."""
        return "velocity"

    def ode_scale(self, t: Any) -> Any:
        """y = x / ode_scale(t)."""
        return array_module(t).ones_like(t)

    def ode_time(self, t: Any) -> Any:
        """The variable of integration."""
        return t

    def conversion(self, t: Any, source: PredictionKind, target: PredictionKind) -> tuple[Any, Any]:
        """Coefficients (a, b) such that target = a x + b source at time t (equations 1 to 5).

        Args:
            t: times in [0, 1], any shape.
            source: what is known.
            target: what is wanted.

        Returns:
            (a, b), each of the shape of `t`. Not finite where no answer exists: data from noise where alpha = 0, noise
            from data and any score where sigma = 0. `check_conversion` asks that on the host.
        """
        xp = array_module(t)
        if source == target:
            return xp.zeros_like(t), xp.ones_like(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if source == "velocity":
            if target == "data":
                return self._data_from_velocity(t)
            a, b = self._noise_from_velocity(t)
            return (a, b) if target == "noise" else (-a / sigma, -b / sigma)
        if target == "velocity":
            if source == "data":
                return self.sigma_dot(t) / sigma, -self._determinant(t) / sigma
            a, b = self.alpha_dot(t) / alpha, self._determinant(t) / alpha
            return (a, b) if source == "noise" else (a, -b * sigma)
        if source == "data":
            a, b = 1.0 / sigma, -alpha / sigma
            return (a, b) if target == "noise" else (-a / sigma, -b / sigma)
        if target == "data":
            return 1.0 / alpha, (-sigma / alpha if source == "noise" else sigma**2 / alpha)
        return xp.zeros_like(t), (-1.0 / sigma if target == "score" else -sigma)

    def convert(
        self, value: jax.Array, x: jax.Array, t: jax.Array, source: PredictionKind, target: PredictionKind
    ) -> jax.Array:
        """Converts a prediction `value` [B, ...] of kind `source` at state `x` [B, ...], time `t` [B], to `target`."""
        if source == target:
            return value
        a, b = self.conversion(jnp.asarray(t), source, target)
        return expand_like(a, x) * x + expand_like(b, x) * value

    def check_conversion(self, t: np.ndarray, source: PredictionKind, target: PredictionKind) -> None:
        """Raises UserError if `source` does not determine `target` at some of the host times `t`."""
        times = np.atleast_1d(np.asarray(t, np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):
            finite = np.all(np.isfinite(self.conversion(times, source, target)), axis=0)
        if not finite.all():
            raise UserError(
                f"On the {self.name} process a {source} prediction does not determine the {target} at "
                f"t = {times[~finite][0]:g}. Set the stepper's t_max below 1 or t_min above 0."
            )

    def score_difference(self, difference: jax.Array, t: jax.Array, target: PredictionKind) -> jax.Array:
        """Turns a difference of scores ds [B, ...] at times `t` [B] into a difference of `target` predictions.

        d eps = -sigma ds, dx_0 = (sigma^2 / alpha) ds, dv = -(sigma D / alpha) ds. Past LARGEST_REGULAR_TIME of a
        continuous process the ratio sigma / alpha is held, in all kinds alike: the difference fades out towards pure
        noise instead of growing without bound in a velocity. A discrete process keeps alpha > 0 and is not changed.
        """
        t = jnp.asarray(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.num_levels is None:
            end = np.float64(LARGEST_REGULAR_TIME)
            ratio = sigma / jnp.maximum(alpha, sigma * float(self.alpha(end) / self.sigma(end)))
        else:
            ratio = sigma / alpha
        factors = {
            "noise": -alpha * ratio,
            "data": sigma * ratio,
            "velocity": -self._determinant(t) * ratio,
            "score": alpha * ratio / sigma,
        }
        return expand_like(factors[target], difference) * difference

    def _determinant(self, t: Any) -> Any:
        return self.alpha(t) * self.sigma_dot(t) - self.alpha_dot(t) * self.sigma(t)

    def _noise_from_velocity(self, t: Any) -> tuple[Any, Any]:
        determinant = self._determinant(t)
        return -self.alpha_dot(t) / determinant, self.alpha(t) / determinant

    def _data_from_velocity(self, t: Any) -> tuple[Any, Any]:
        determinant = self._determinant(t)
        return self.sigma_dot(t) / determinant, -self.sigma(t) / determinant


@dataclasses.dataclass(frozen=True)
class Linear(Process):
    """The linear path of SiT: alpha = 1 - t, sigma = t, v = eps - x_0."""

    name = "linear"
    num_levels = None

    def alpha(self, t: Any) -> Any:
        return 1.0 - t

    def sigma(self, t: Any) -> Any:
        return 1.0 * t

    def alpha_dot(self, t: Any) -> Any:
        return -array_module(t).ones_like(t)

    def sigma_dot(self, t: Any) -> Any:
        return array_module(t).ones_like(t)

    def time_of_sigma(self, sigma: Any) -> Any:
        return array_module(sigma).where(sigma <= 1.0, sigma, np.nan)

    def time_of_ratio(self, ratio: Any) -> Any:
        return ratio / (1.0 + ratio)


@dataclasses.dataclass(frozen=True)
class GVP(Process):
    """The generalised variance-preserving path of SiT: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name = "gvp"
    num_levels = None

    def alpha(self, t: Any) -> Any:
        # sin of the complement: exactly 0 at t = 1, where cos(pi / 2) would leave 6e-17 (and -4e-8 in float32).
        return array_module(t).sin(0.5 * np.pi * (1.0 - t))

    def sigma(self, t: Any) -> Any:
        return array_module(t).sin(0.5 * np.pi * t)

    def alpha_dot(self, t: Any) -> Any:
        return -0.5 * np.pi * self.sigma(t)

    def sigma_dot(self, t: Any) -> Any:
        return 0.5 * np.pi * self.alpha(t)

    def time_of_sigma(self, sigma: Any) -> Any:
        xp = array_module(sigma)
        return xp.where(sigma <= 1.0, xp.arcsin(xp.minimum(sigma, 1.0)) * (2.0 / np.pi), np.nan)

    def time_of_ratio(self, ratio: Any) -> Any:
        return array_module(ratio).arctan(ratio) * (2.0 / np.pi)


@dataclasses.dataclass(frozen=True)
class DDPM(Process):
    """The discrete DDPM process with linear betas, on the axis t_k = (k + 1) / num_levels.

    t = 0 is clean data and no network is ever asked there. Between the levels, and from t = 0 to the first, log
    alpha-bar is linear in t, which agrees with the discrete process at every level.

    Attributes:
        num_levels: number of steps (DiT: 1000).
        beta_start, beta_end: first and last variance of the forward steps (DiT: 1e-4 and 0.02).
    """

    num_levels: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    name = "ddpm"
    ode_kind: ClassVar[PredictionKind] = "noise"

    @functools.cached_property
    def _grid(self) -> np.ndarray:
        return np.arange(self.num_levels + 1) / self.num_levels

    @functools.cached_property
    def _log_alpha_bar_grid(self) -> np.ndarray:
        betas = np.linspace(self.beta_start, self.beta_end, self.num_levels, dtype=np.float64)
        return np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])

    @functools.cached_property
    def _slopes(self) -> np.ndarray:
        return np.diff(self._log_alpha_bar_grid) * self.num_levels

    def _log_alpha_bar(self, t: Any) -> Any:
        xp = array_module(t)
        return xp.interp(t, xp.asarray(self._grid), xp.asarray(self._log_alpha_bar_grid))

    def _log_alpha_bar_dot(self, t: Any) -> Any:
        # At a level the slope towards the data is taken: samplers leave a level in that direction.
        xp = array_module(t)
        interval = xp.searchsorted(xp.asarray(self._grid, dtype=getattr(t, "dtype", None)), t, side="left") - 1
        return xp.asarray(self._slopes)[xp.clip(interval, 0, self.num_levels - 1)]

    def alpha(self, t: Any) -> Any:
        return array_module(t).exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: Any) -> Any:
        xp = array_module(t)
        return xp.sqrt(-xp.expm1(self._log_alpha_bar(t)))

    def alpha_dot(self, t: Any) -> Any:
        return 0.5 * self._log_alpha_bar_dot(t) * self.alpha(t)

    def sigma_dot(self, t: Any) -> Any:
        return -0.5 * self._log_alpha_bar_dot(t) * self.alpha(t) ** 2 / self.sigma(t)

    def _determinant(self, t: Any) -> Any:
        return -0.5 * self._log_alpha_bar_dot(t) * self.alpha(t) / self.sigma(t)

    def _noise_from_velocity(self, t: Any) -> tuple[Any, Any]:
        return self.sigma(t), -2.0 * self.sigma(t) / self._log_alpha_bar_dot(t)

    def _data_from_velocity(self, t: Any) -> tuple[Any, Any]:
        alpha = self.alpha(t)
        return alpha, 2.0 * self.sigma(t) ** 2 / (alpha * self._log_alpha_bar_dot(t))

    def _time_of_log_alpha_bar(self, log_alpha_bar: Any) -> Any:
        xp = array_module(log_alpha_bar)
        return xp.interp(-log_alpha_bar, xp.asarray(-self._log_alpha_bar_grid), xp.asarray(self._grid))

    def time_of_sigma(self, sigma: Any) -> Any:
        xp = array_module(sigma)
        largest = float(self.sigma(np.float64(1.0)))
        t = self._time_of_log_alpha_bar(xp.log1p(-(xp.minimum(sigma, largest) ** 2)))
        return xp.where(sigma <= largest, t, np.nan)

    def time_of_ratio(self, ratio: Any) -> Any:
        return self._time_of_log_alpha_bar(-array_module(ratio).log1p(ratio**2))

    def time_grid(self, num_steps: int, t_max: float = 1.0, t_min: float = 0.0) -> np.ndarray:
        """Respaced levels from `t_max` down, then `t_min`: [num_steps + 1], float64.

        For the whole range these are the levels that DiT's 250 respaced steps take: `num_steps` levels spread evenly
        over all of them, first and last included, rounded.
        """
        check_grid(num_steps, t_max, t_min)
        last = int(np.floor(t_max * self.num_levels + 1e-9)) - 1
        first = int(np.floor(t_min * self.num_levels + 1e-9))
        if num_steps > last - first + 1:
            raise UserError(
                f"num_steps = {num_steps} is more than the {last - first + 1} levels of the DDPM process between "
                f"t = {t_min:g} and {t_max:g}. Ask for at most that many steps."
            )
        if num_steps == 1:
            steps = np.array([last])
        else:
            # Added up and then rounded, as the public code does: i * stride would round some ties the other way.
            stride = (last - first) / (num_steps - 1)
            cursors = itertools.accumulate([stride] * (num_steps - 1), initial=0.0)
            steps = np.array([first + round(cursor) for cursor in cursors])
        return np.append((steps[::-1] + 1) / self.num_levels, t_min)

    def ode_scale(self, t: Any) -> Any:
        return self.alpha(t)

    def ode_time(self, t: Any) -> Any:
        return self.sigma(t) / self.alpha(t)


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """Which process a run uses.

    Attributes:
        name: "linear", "gvp" or "ddpm".
        num_levels: levels of the DDPM process; not used by the others.
    """

    name: str = "linear"
    num_levels: int = 1000


def make_process(config: ProcessConfig) -> Process:
    """Makes the process that `config` names. Raises UserError for an unknown name."""
    if config.name == "ddpm":
        return DDPM(num_levels=config.num_levels)
    processes: dict[str, type[Process]] = {"linear": Linear, "gvp": GVP}
    if config.name not in processes:
        raise UserError(f"process.name = {config.name!r} is not a process. Known: linear, gvp, ddpm.")
    return processes[config.name]()


def check_grid(num_steps: int, t_max: float, t_min: float) -> None:
    """Raises UserError unless `num_steps` >= 1 and 0 <= t_min < t_max <= 1."""
    if num_steps < 1:
        raise UserError(f"num_steps = {num_steps}: a sampler takes at least one step.")
    if not 0.0 <= t_min < t_max <= 1.0:
        raise UserError(f"A time grid needs 0 <= t_min < t_max <= 1, got t_min = {t_min:g} and t_max = {t_max:g}.")
