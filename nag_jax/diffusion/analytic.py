"""Exact diffusion of a Gaussian mixture: everything a network estimates, in closed form.

For data sum_k pi_k N(mu_k, Sigma_k) and x_t = alpha x_0 + sigma eps the noisy states are again a mixture. A `Mixture`
answers as a denoiser and as a posterior over noise levels, and so stands in wherever a network does. It holds no
networks and no samplers; errors put into an exact score on purpose are in `analytic_gaussian.py`.

With the eigenvectors u_kj and eigenvalues lambda_kj of Sigma_k, s_kj = alpha^2 lambda_kj + sigma^2, the coordinates
c_kj = u_kj . (x - alpha mu_k), and responsibilities r_k = p(k | x, t):
    (1) p(x | t) = sum_k pi_k N(x; alpha mu_k, alpha^2 Sigma_k + sigma^2 I)
    (2) score(x | t) = sum_k r_k sum_j -(1 / s_kj) c_kj u_kj
    (3) E[x_0 | x, t] = sum_k r_k (mu_k + sum_j (alpha lambda_kj / s_kj) c_kj u_kj)
    (4) E[eps | x, t] = sum_k r_k sum_j (sigma / s_kj) c_kj u_kj
    (5) E[v | x, t] = alpha' E[x_0 | x, t] + sigma' E[eps | x, t]
    (6) p(x) = sum_i w_i p(x | t_i) over noise levels t_i that have the prior probabilities w_i
    (7) p(t | x) = p(t) p(x | t) / p(x),  E[g(t) | x] = sum_i p(t_i | x) g(t_i)
    (8) score(x) = E[score(x | t) | x] = score(x | t) - grad_x log p(t | x)
Given a class, p(x | c) is the mixture of the components of that class, and all of the above follows for it.

Eigenvectors with eigenvalue 0 in every component are not stored: what they span is handled as one residual, so data
of low rank in a high dimension are cheap. Such data have no density at sigma = 0: ask for them at t > 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from numpy.typing import ArrayLike

from nag_jax.denoiser import Denoiser, Params, Prediction
from nag_jax.diffusion.process import PredictionKind, Process, expand_like
from nag_jax.errors import UserError

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture under a noising process. Made by `make_mixture`; hashable once `params` is None.

    Every method is pure and takes the parameters as its first argument (usually `mixture.params`; float64 numpy, used
    in the dtype of `x`). `labels` are int32 [B] in [0, num_classes], where num_classes itself, or None for all rows,
    stands for the whole mixture.

    Attributes:
        process: the noising process.
        sample_shape: shape of one state.
        num_classes: number of classes that the components belong to.
        params: log_weights [num_classes + 1, K] (row c: log p(component | class c); last row: of the whole mixture),
            means [K, d], basis [K, d, rank] and eigenvalues [K, rank] of the covariances, levels [T] and
            log_level_weights [T] of the prior over noise levels.
    """

    process: Process
    sample_shape: tuple[int, ...]
    num_classes: int
    params: Params

    def log_density(self, params: Params, x: jax.Array, t: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """log p(x | t), or log p(x | t, class), for states x [B, ...] and times t [B]: [B] (equation 1)."""
        return _evaluate(self.process, params, x, t, self._rows(labels, x))[0]

    def posterior_mean(
        self, params: Params, x: jax.Array, t: jax.Array, kind: PredictionKind, labels: jax.Array | None = None
    ) -> jax.Array:
        """E[target | x, t] for states x [B, ...] and times t [B]: [B, ...] (equations 2 to 5).

        `kind` names the target; the mean of the score target -eps / sigma is the score. Nothing is divided by alpha or,
        for components of full rank, by sigma: all kinds are exact at t = 1, and at t = 0 on the continuous processes.
        """
        return _evaluate(self.process, params, x, t, self._rows(labels, x))[1][kind]

    def log_marginal(self, params: Params, x: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """log p(x) of a state x [B, ...] of unknown noise level, or log p(x | class): [B] (equation 6)."""
        log_joint, _ = _evaluate_levels(self.process, params, x, self._rows(labels, x), "score")
        return logsumexp(log_joint, axis=0)

    def marginal_mean(
        self, params: Params, x: jax.Array, kind: PredictionKind, labels: jax.Array | None = None
    ) -> jax.Array:
        """E[target | x] over unknown noise levels, for states x [B, ...]: [B, ...] (equation 7).

        What a network whose noise condition was dropped learns. For "score" it is the score of p(x) (equation 8); the
        other kinds, converted at some t, are something else.
        """
        log_joint, targets = _evaluate_levels(self.process, params, x, self._rows(labels, x), kind)
        return jnp.einsum("tb,tb...->b...", jax.nn.softmax(log_joint, axis=0), targets, precision=HIGHEST)

    def log_posterior(self, params: Params, x: jax.Array, t: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """log p(t | x) for states x [B, ...] and times t [B]: [B] (equation 7).

        A density relative to the uniform distribution over the levels: the mean of its exponential over the levels is
        1. For a continuous process with its default levels this is the density in t; for a discrete process it is the
        probability times the number of levels. The prior at a t between levels is that of the nearest one.
        """
        levels, log_weights = (_cast(params[name], x) for name in ("levels", "log_level_weights"))
        nearest = jnp.argmin(jnp.abs(jnp.asarray(t, x.dtype)[:, None] - levels), axis=1)
        log_prior = log_weights[nearest] + np.log(levels.shape[0])
        return log_prior + self.log_density(params, x, t, labels) - self.log_marginal(params, x, labels)

    def sample_data(self, params: Params, key: jax.Array, count: int, labels: jax.Array | None = None) -> jax.Array:
        """`count` exact samples of x_0 [count, ...], of the classes `labels` [count] or of the whole mixture."""
        component_key, normal_key = jax.random.split(key)
        dtype = jnp.result_type(float)
        means, basis, eigenvalues = (jnp.asarray(params[name], dtype) for name in ("means", "basis", "eigenvalues"))
        rows = jnp.full((count,), self.num_classes) if labels is None else labels
        logits = jnp.asarray(params["log_weights"], dtype)[rows]
        chosen = jax.nn.one_hot(jax.random.categorical(component_key, logits), means.shape[0], dtype=dtype)
        normal = jax.random.normal(normal_key, (count, eigenvalues.shape[1]), dtype)
        coordinates = chosen[:, :, None] * jnp.sqrt(eigenvalues) * normal[:, None]
        x = _matmul(chosen, means) + jnp.einsum("bkr,kdr->bd", coordinates, basis, precision=HIGHEST)
        return x.reshape((count, *self.sample_shape))

    def moments(self, params: Params, t: float, label: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] of the states at time `t` (0: the data), float64 on the host."""
        p = {name: np.asarray(value, np.float64) for name, value in params.items()}
        weights = np.exp(p["log_weights"][-1 if label is None else label])
        mean = weights @ p["means"]
        offsets = p["means"] - mean
        covariance = np.einsum("k,kdr,kr,ker->de", weights, p["basis"], p["eigenvalues"], p["basis"], optimize=True)
        covariance += np.einsum("k,kd,ke->de", weights, offsets, offsets)
        alpha, sigma = self.process.alpha(np.float64(t)), self.process.sigma(np.float64(t))
        return alpha * mean, alpha**2 * covariance + sigma**2 * np.eye(len(mean))

    def gaussian_flow(self, params: Params, x: jax.Array, t_from: jax.Array, t_to: jax.Array) -> jax.Array:
        """Carries states x [B, ...] along the probability-flow ODE from times `t_from` [B] to `t_to` [B], exactly.

        About the mean, every eigen-direction is scaled by sqrt(s_j(t_to) / s_j(t_from)). Raises UserError for more
        than one component, where no closed form exists.
        """
        if params["means"].shape[0] != 1:
            raise UserError("gaussian_flow is exact for one Gaussian; this mixture has several components.")
        coordinates, residual, variances, _, sigma = _project(self.process, params, x, t_from)
        _, _, variances_to, alpha_to, sigma_to = _project(self.process, params, x, t_to)
        flat = alpha_to * _cast(params["means"], x)
        flat += _matmul(coordinates * jnp.sqrt(variances_to / variances), _cast(params["basis"], x).mT)[0]
        if residual is not None:
            flat += (sigma_to / sigma * residual)[0]
        return flat.reshape(x.shape)

    def denoiser(self, prediction: PredictionKind = "velocity") -> Denoiser:
        """The mixture as a Denoiser that answers its posterior means of kind `prediction`.

        Rows with `drop_label` ask the whole mixture; rows with `drop_noise` are answered E[target | x] of that same
        prediction kind, whatever their t.
        """
        function = MixtureFunction(self.without_params(), prediction)
        return Denoiser(function, self.params, self.process, prediction, self.num_classes, self.sample_shape)

    def time_posterior(self) -> tuple[MixtureTimePosterior, Params]:
        """p(t | x) of the whole mixture as a TimePosterior, and its parameters."""
        return MixtureTimePosterior(self.without_params()), self.params

    def without_params(self) -> Mixture:
        """The same mixture with `params` None: hashable, so that it can be a static argument of a program."""
        return dataclasses.replace(self, params=None)

    def _rows(self, labels: jax.Array | None, x: jax.Array) -> jax.Array:
        return jnp.full((x.shape[0],), self.num_classes) if labels is None else labels


def make_mixture(
    process: Process,
    means: ArrayLike,
    *,
    covariances: ArrayLike | None = None,
    factors: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    classes: ArrayLike | None = None,
    levels: ArrayLike | None = None,
    level_weights: ArrayLike | None = None,
) -> Mixture:
    """Makes the mixture sum_k weights_k N(means_k, covariance_k) of data, in float64 on the host.

    Args:
        process: the noising process.
        means: [K, *sample_shape].
        covariances: [K, d, d] with d the size of a state, or variances of isotropic components, [K] or a scalar
            (0: point masses).
        factors: [K, r, *sample_shape] instead of covariances, for data of rank r: component k is
            means_k + sum_j z_j factors_kj with standard normal z.
        weights: [K], positive; default equal. Normalised here.
        classes: int [K], the class of each component, every class in [0, num_classes) used; default one class.
        levels: [T], the noise levels of the prior p(t), in (0, 1]; default `process.levels(200)`.
        level_weights: [T], their probabilities, positive; default equal. Normalised here.

    Raises:
        UserError: for inputs that do not fit together.
    """
    means = np.asarray(means, np.float64)
    count, sample_shape = means.shape[0], means.shape[1:]
    if (covariances is None) == (factors is None):
        raise UserError("make_mixture takes either covariances or factors.")
    means = means.reshape(count, -1)
    if factors is not None:
        basis, eigenvalues = _eigenbasis_of_factors(np.asarray(factors, np.float64), means)
    else:
        basis, eigenvalues = _eigenbasis_of_covariances(np.asarray(covariances, np.float64), means)

    classes = np.zeros(count, int) if classes is None else np.asarray(classes)
    num_classes = int(classes.max()) + 1
    if classes.shape != (count,) or set(classes.tolist()) != set(range(num_classes)):
        raise UserError(f"classes must give each of {count} components a class in [0, {num_classes}), none unused.")
    log_weights = _log_probabilities(weights, count, "weights")
    members = np.concatenate([classes == np.arange(num_classes)[:, None], np.ones((1, count), bool)])
    rows = np.where(members, log_weights, -np.inf)
    levels = process.levels(200) if levels is None else np.asarray(levels, np.float64)
    params = {
        "log_weights": rows - np.logaddexp.reduce(rows, axis=1, keepdims=True),
        "means": means,
        "basis": basis,
        "eigenvalues": eigenvalues,
        "levels": levels,
        "log_level_weights": _log_probabilities(level_weights, len(levels), "level_weights"),
    }
    return Mixture(process, sample_shape, num_classes, params)


@dataclasses.dataclass(frozen=True)
class MixtureFunction:
    """The function behind `Mixture.denoiser`."""

    mixture: Mixture
    prediction: PredictionKind

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None,
    ) -> Prediction:
        if time_embedding_offset is not None:
            raise UserError("A mixture has no time embedding: time_embedding_offset must be None.")
        rows = jnp.where(drop_label, self.mixture.num_classes, labels)
        value = self.mixture.posterior_mean(params, x, t, self.prediction, rows)

        def replace_dropped(value: jax.Array) -> jax.Array:
            null = self.mixture.marginal_mean(params, x, self.prediction, rows)
            return jnp.where(expand_like(drop_noise, x), null, value)

        # The sum over all levels is paid for only where some row asks for it.
        return Prediction(jax.lax.cond(jnp.any(drop_noise), replace_dropped, lambda value: value, value))


@dataclasses.dataclass(frozen=True)
class MixtureTimePosterior:
    """p(t | x) of a whole mixture; a `TimePosterior`."""

    mixture: Mixture

    def log_density(self, params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        """log p(t | x) [B], as `Mixture.log_posterior`."""
        return self.mixture.log_posterior(params, x, t)

    def quadrature(self, params: Params, x: jax.Array, num_nodes: int) -> tuple[jax.Array, jax.Array]:
        """Nodes [num_nodes, B] and weights [num_nodes, B] (equation 7).

        With as many nodes as the mixture has levels this is the exact posterior; with fewer, the posterior under a
        prior on an evenly spread subset of them. Raises UserError for more nodes than levels.
        """
        num_levels = params["levels"].shape[0]
        if num_nodes > num_levels:
            raise UserError(f"num_nodes = {num_nodes} is more than the {num_levels} levels of the mixture.")
        chosen = np.round(np.linspace(0, num_levels - 1, num_nodes)).astype(int)
        subset = {**params, **{name: params[name][chosen] for name in ("levels", "log_level_weights")}}
        rows = jnp.full((x.shape[0],), self.mixture.num_classes)
        log_joint, _ = _evaluate_levels(self.mixture.process, subset, x, rows, "score")
        nodes = jnp.broadcast_to(_cast(subset["levels"], x)[:, None], log_joint.shape)
        return nodes, jax.nn.softmax(log_joint, axis=0)


def _project(process: Process, params: Params, x: jax.Array, t: jax.Array) -> tuple[Any, Any, Any, Any, Any]:
    """Coordinates [K, B, rank], residual [K, B, d] or None, s [K, B, rank], alpha [B, 1] and sigma [B, 1]."""
    means, basis = _cast(params["means"], x), _cast(params["basis"], x)
    alpha, sigma = (_cast(f(_cast(t, x)), x)[:, None] for f in (process.alpha, process.sigma))
    offsets = x.reshape(x.shape[0], -1) - alpha * means[:, None]
    coordinates = _matmul(offsets, basis)
    has_full_rank = basis.shape[1] == basis.shape[2]
    residual = None if has_full_rank else offsets - _matmul(coordinates, basis.mT)
    variances = alpha**2 * _cast(params["eigenvalues"], x)[:, None] + sigma**2
    return coordinates, residual, variances, alpha, sigma


@functools.partial(jax.jit, static_argnames="process")
def _evaluate(
    process: Process, params: Params, x: jax.Array, t: jax.Array, rows: jax.Array
) -> tuple[jax.Array, dict[PredictionKind, jax.Array]]:
    """log p(x | t) [B] and E[target | x, t] [B, ...] of every kind, with row `rows` [B] of the table of weights."""
    coordinates, residual, variances, alpha, sigma = _project(process, params, x, t)
    log_normal = -0.5 * jnp.sum(coordinates**2 / variances + jnp.log(2 * np.pi * variances), axis=-1)
    if residual is not None:
        missing = residual.shape[-1] - coordinates.shape[-1]
        log_normal -= 0.5 * jnp.sum((residual / sigma) ** 2, axis=-1)
        log_normal -= missing * jnp.log(np.sqrt(2 * np.pi) * sigma[:, 0])
    log_joint = _cast(params["log_weights"], x)[rows].T + log_normal
    responsibilities = jax.nn.softmax(log_joint, axis=0)[:, :, None]

    def mean(gain: jax.Array, gain_outside: Any, center: Any = 0.0) -> jax.Array:
        component = center + _matmul(coordinates * gain, _cast(params["basis"], x).mT)
        if residual is not None:
            component += residual * gain_outside
        return jnp.sum(responsibilities * component, axis=0).reshape(x.shape)

    eigenvalues, centers = _cast(params["eigenvalues"], x)[:, None], _cast(params["means"], x)[:, None]
    data = mean(alpha * eigenvalues / variances, 0.0, centers)
    noise = mean(sigma / variances, 1.0 / sigma)
    alpha_dot, sigma_dot = (_cast(f(_cast(t, x)), x) for f in (process.alpha_dot, process.sigma_dot))
    targets: dict[PredictionKind, jax.Array] = {
        "velocity": expand_like(alpha_dot, x) * data + expand_like(sigma_dot, x) * noise,
        "noise": noise,
        "data": data,
        "score": mean(-1.0 / variances, -1.0 / sigma**2),
    }
    return logsumexp(log_joint, axis=0), targets


@functools.partial(jax.jit, static_argnames=("process", "kind"))
def _evaluate_levels(
    process: Process, params: Params, x: jax.Array, rows: jax.Array, kind: PredictionKind
) -> tuple[jax.Array, jax.Array]:
    """log w_i + log p(x | t_i) [T, B] and E[target | x, t_i] [T, B, ...] at every level, one after the other."""

    def evaluate(level: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_density, targets = _evaluate(process, params, x, jnp.full((x.shape[0],), level), rows)
        return log_density, targets[kind]

    log_density, targets = jax.lax.map(evaluate, _cast(params["levels"], x))
    return _cast(params["log_level_weights"], x)[:, None] + log_density, targets


def _cast(value: Any, x: jax.Array) -> jax.Array:
    return jnp.asarray(value, x.dtype)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _log_probabilities(weights: ArrayLike | None, count: int, name: str) -> np.ndarray:
    weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (count,) or not (weights > 0).all():
        raise UserError(f"{name} must be {count} positive numbers, got an array of shape {weights.shape}.")
    return np.log(weights / weights.sum())


def _eigenbasis_of_covariances(covariances: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Basis [K, d, rank] and eigenvalues [K, rank], rank being the largest rank of a component."""
    count, size = means.shape
    if covariances.ndim < 2:
        covariances = np.broadcast_to(covariances, (count,))[:, None, None] * np.eye(size)
    if covariances.shape != (count, size, size):
        raise UserError(f"covariances has shape {covariances.shape}; expected {(count, size, size)}.")
    eigenvalues, basis = np.linalg.eigh(covariances)
    tolerance = np.finfo(np.float64).eps * size * np.abs(eigenvalues).max(initial=0.0)
    if (eigenvalues < -tolerance).any():
        raise UserError("covariances must be positive semi-definite.")
    rank = int((eigenvalues > tolerance).sum(axis=1).max())
    # eigh sorts ascending: the last `rank` directions hold every eigenvalue that is not zero.
    return basis[:, :, size - rank :], np.maximum(eigenvalues[:, size - rank :], 0.0)


def _eigenbasis_of_factors(factors: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, size = means.shape
    if factors.shape[:1] != (count,) or int(np.prod(factors.shape[2:])) != size:
        raise UserError(f"factors has shape {factors.shape}; expected ({count}, rank, *sample_shape).")
    _, singular_values, rows = np.linalg.svd(factors.reshape(count, -1, size), full_matrices=False)
    return np.swapaxes(rows, 1, 2), singular_values**2
