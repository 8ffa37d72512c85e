"""Trains the noise-level estimator g(t | x): a denoiser's trunk, fine-tuned to tell the noise level of a state.

The network is in `nag_jax/models/noise_estimator.py`; its files and when they may be used again are in `store.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nag_jax.data.draws import epoch_order
from nag_jax.denoiser import Params
from nag_jax.diffusion.objective import row_keys
from nag_jax.diffusion.process import Process
from nag_jax.diffusion.time_posterior import Estimator, GaussianTimePosterior
from nag_jax.errors import TrainingDivergedError, UserError
from nag_jax.models.noise_estimator import NoiseEstimator, estimator_params
from nag_jax.parallel import to_host

Role: TypeAlias = Literal["measure", "guide"]
ROLES: tuple[Role, ...] = get_args(Role)

# Steps per call of the compiled loop, at most: one wait for the host each.
MAX_STEPS_PER_CALL = 25


@dataclasses.dataclass(frozen=True)
class EstimatorConfig:
    """How an estimator is trained.

    Attributes:
        num_steps: optimizer steps.
        batch_size: examples per step.
        learning_rate: largest rate of AdamW; it rises over the first tenth of the steps and falls as a cosine to 0.
            Networks of the published sizes want a smaller one, about 1e-4 as their own training.
        weight_decay: of AdamW.
        beta: each example's likelihood is weighted by its predicted variance to this power, as a constant (beta-NLL,
            arXiv 2203.09168). 0 is the likelihood itself, 1 fits the mean as least squares does. On digits .5 beat 0
            by .5 to 3 % in the error of the mean in five pairs of runs of 150 or 200 steps (in likelihood in four of
            them); in the one pair of 300 steps the means were equal and 0 had the better likelihood.
    """

    num_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError(
                f"estimator.num_steps = {self.num_steps} and estimator.batch_size = {self.batch_size} must be >= 1."
            )
        if not 0.0 <= self.beta <= 1.0:
            raise UserError(f"estimator.beta = {self.beta} is not in [0, 1].")


@dataclasses.dataclass(frozen=True)
class EstimatorFunction:
    """(params, x) -> (mean, log variance) of t; the `apply` of a `GaussianTimePosterior`.

    Attributes:
        model: from `build_estimator`.
    """

    model: NoiseEstimator

    def __call__(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        answer: Any = self.model.apply({"params": params}, x)
        return answer


def make_estimator(model: NoiseEstimator, params: Params) -> Estimator:
    """The trained network as the time posterior that measurement, guidance and corrections take."""
    return Estimator(GaussianTimePosterior(EstimatorFunction(model)), params)


def estimator_seed(seed: int, role: Role) -> int:
    """The seed of the estimator that a run with `seed` uses for a purpose, in [0, 2^32).

    The one that guides ("guide") and the one that measures ("measure") see other data orders, levels and noises, so
    that no method is graded by the network that steered it. Raises UserError for another role.
    """
    if role not in ROLES:
        raise UserError(f"An estimator's role is one of {', '.join(ROLES)}, got {role!r}.")
    return zlib.crc32(f"noise-level estimator, {role}, seed {seed}".encode())


def image_batches(images: np.ndarray, batch_size: int, *, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of an array in memory: one permutation of it after the other.

    Args:
        images: float32 [N, ...].
        batch_size: images per batch; a batch may reach into the next permutation.
        seed: of the permutations, >= 0.

    Yields:
        [batch_size, ...]
    """
    if len(images) == 0:
        raise UserError("The estimator has no images to train on.")
    step = 0
    while True:
        position = step * batch_size + np.arange(batch_size)
        epochs, places = np.divmod(position, len(images))
        yield images[[epoch_order(seed, int(e), len(images))[p] for e, p in zip(epochs, places, strict=True)]]
        step += 1


def train_estimator(
    model: NoiseEstimator,
    trunk_params: Params,
    process: Process,
    batches: Iterator[np.ndarray],
    config: EstimatorConfig,
    *,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> Params:
    """Fine-tunes an estimator from a trained denoiser.

    Levels are uniform over those that the denoiser is trained at; each example's level and noise are a function of
    (seed, step, row). What is minimised is the Gaussian negative log-likelihood of t, weighted as `config.beta` says.

    Args:
        model: from `build_estimator`.
        trunk_params: the denoiser's parameters; they are copied.
        process: the noising process.
        batches: x_0, float32 [config.batch_size, ...] each, at least `config.num_steps` of them. See `image_batches`.
        config: how to train.
        seed: of levels and noise; see `estimator_seed`.
        progress: called with (steps done, mean loss over the last steps) every few steps.

    Returns:
        The estimator's parameters.

    Raises:
        TrainingDivergedError: the loss is no longer finite.
        UserError: there are too few batches.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    params = jax.tree.map(jnp.array, estimator_params(trunk_params, key, model))
    opt_state = make_optimizer(config).init(params)
    steps_per_call = max(n for n in range(1, MAX_STEPS_PER_CALL + 1) if config.num_steps % n == 0)
    for first_step in range(0, config.num_steps, steps_per_call):
        chunk = [batch for _, batch in zip(range(steps_per_call), batches, strict=False)]
        if len(chunk) < steps_per_call:
            raise UserError(
                f"The estimator's data end after {first_step + len(chunk)} of estimator.num_steps = "
                f"{config.num_steps} batches. Give an endless iterator, or ask for fewer steps."
            )
        steps = np.arange(first_step, first_step + steps_per_call, dtype=np.int32)
        params, opt_state, losses = _train_steps(model, process, config, params, opt_state, np.stack(chunk), steps, key)
        losses = to_host(losses)
        if not np.isfinite(losses).all():
            raise TrainingDivergedError(
                f"The noise-level estimator's loss is not finite at its step {steps[~np.isfinite(losses)][0]}. "
                f"Lower estimator.learning_rate (now {config.learning_rate:g})."
            )
        if progress is not None:
            progress(first_step + steps_per_call, float(losses.mean()))
    return params


def make_optimizer(config: EstimatorConfig) -> optax.GradientTransformation:
    """AdamW whose rate rises linearly, then falls as a cosine to 0; gradients are clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=math.ceil(config.num_steps / 10),
        decay_steps=max(config.num_steps, 2),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))


def negative_log_likelihood(mean: jax.Array, log_variance: jax.Array, t: jax.Array) -> jax.Array:
    """-log N(t; mean, exp(log_variance)), elementwise."""
    return 0.5 * (jnp.square(t - mean) * jnp.exp(-log_variance) + log_variance + math.log(2.0 * math.pi))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _train_steps(
    model: NoiseEstimator,
    process: Process,
    config: EstimatorConfig,
    params: Params,
    opt_state: Any,
    images: jax.Array,
    steps: jax.Array,
    key: jax.Array,
) -> tuple[Params, Any, jax.Array]:
    """As many steps as `steps` [K] holds, on images [K, B, ...]; returns the mean loss of each, [K]."""
    optimizer = make_optimizer(config)
    positions = jnp.arange(images.shape[1])

    def loss(params: Params, x_0: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = process.nearest_level(jax.vmap(jax.random.uniform)(row_keys(key, "estimator_time", step, positions)))
        noise_keys = row_keys(key, "estimator_noise", step, positions)
        noise = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(noise_keys)
        mean, log_variance = EstimatorFunction(model)(params, process.add_noise(x_0, noise, t))
        likelihoods = negative_log_likelihood(mean, log_variance, t)
        weights = jax.lax.stop_gradient(jnp.exp(config.beta * log_variance))
        return jnp.mean(weights * likelihoods), jnp.mean(likelihoods)

    def advance(carry: tuple[Params, Any], batch: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        params, opt_state = carry
        gradient, likelihood = jax.grad(loss, has_aux=True)(params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), likelihood

    (params, opt_state), likelihoods = jax.lax.scan(advance, (params, opt_state), (images, steps))
    return params, opt_state, likelihoods
