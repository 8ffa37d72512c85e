"""What a denoiser is trained on: the random draws of an example, its losses, and sums of losses by noise level.

Draws are keyed by (stream name, step, position of the row in the global batch), so micro-batches, meshes and pmap see
the same ones. No optimizer, no networks and no samplers here; alpha, sigma and conversions come from the process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.denoiser import Denoiser, Params
from nag_jax.diffusion.ancestral import AncestralCoefficients, ancestral_coefficients
from nag_jax.diffusion.process import Process, expand_like
from nag_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is predicted, at which noise levels, and how often a condition is dropped.

    Attributes:
        prediction: target of the network, "velocity" or "noise".
        learn_variance: add the variational term that trains the variance output (DDPM with "noise" only).
        time_sampling: "uniform", or "logit_normal" (t = sigmoid(logit_mean + logit_std n), n standard normal).
        logit_mean: location of the logit-normal.
        logit_std: scale of the logit-normal, above 0.
        label_dropout: share of examples trained without their class, in [0, 1].
        noise_dropout: share of examples trained without their noise level, in [0, 1]; they keep their noisy state.
        dropout: "independent" (a coin for each condition) or "joint" (one coin drops both).
        variance_on_dropped: whether examples without their noise level keep the variational term.
        num_buckets: equal intervals of t for which losses are reported.
    """

    prediction: Literal["velocity", "noise"] = "velocity"
    learn_variance: bool = False
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    label_dropout: float = 0.1
    noise_dropout: float = 0.1
    dropout: Literal["independent", "joint"] = "independent"
    variance_on_dropped: bool = True
    num_buckets: int = 10

    def __post_init__(self) -> None:
        known = {
            "prediction": ("velocity", "noise"),
            "time_sampling": ("uniform", "logit_normal"),
            "dropout": ("independent", "joint"),
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise UserError(f"objective.{key} = {getattr(self, key)!r} is not one of {', '.join(values)}.")
        for key in ("label_dropout", "noise_dropout"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise UserError(f"objective.{key} = {getattr(self, key)} is not a share between 0 and 1.")
        if self.dropout == "joint" and self.label_dropout != self.noise_dropout:
            raise UserError(
                "objective.dropout = 'joint' drops both conditions with one coin: set objective.label_dropout "
                f"({self.label_dropout}) equal to objective.noise_dropout ({self.noise_dropout})."
            )
        if self.logit_std <= 0.0:
            raise UserError(f"objective.logit_std = {self.logit_std} must be above 0.")
        if self.num_buckets < 1:
            raise UserError(f"objective.num_buckets = {self.num_buckets} must be at least 1.")


def check_objective(objective: Objective, denoiser: Denoiser) -> None:
    """Raises UserError unless `denoiser` can be trained on `objective`."""
    if denoiser.prediction != objective.prediction:
        raise UserError(
            f"objective.prediction = {objective.prediction!r}, but the network predicts {denoiser.prediction}. "
            "Make the two equal."
        )
    if objective.learn_variance and (denoiser.process.num_levels is None or objective.prediction != "noise"):
        raise UserError(
            "objective.learn_variance needs process.name = 'ddpm' and objective.prediction = 'noise', got "
            f"{denoiser.process.name!r} and {objective.prediction!r}."
        )
    if objective.label_dropout > 0.0 and not denoiser.has_null_label:
        raise UserError("This denoiser has no null label: set objective.label_dropout = 0.")
    if objective.noise_dropout > 0.0 and not denoiser.has_null_noise:
        raise UserError("This denoiser has no null noise embedding: set objective.noise_dropout = 0.")


class Draws(NamedTuple):
    """The random numbers of a batch.

    Attributes:
        t: float32 [B], in [0, 1].
        noise: float32 [B, ...], standard normal.
        drop_label: bool [B].
        drop_noise: bool [B].
    """

    t: jax.Array
    noise: jax.Array
    drop_label: jax.Array
    drop_noise: jax.Array


def row_keys(run_key: jax.Array, stream: str, step: jax.Array | int, positions: jax.Array) -> jax.Array:
    """One typed key for each row: a function of the run's key, the stream's name, the step and the row's position."""
    key = jax.random.fold_in(jax.random.fold_in(run_key, zlib.crc32(stream.encode())), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(positions)


def draw(
    objective: Objective,
    process: Process,
    run_key: jax.Array,
    step: jax.Array | int,
    positions: jax.Array,
    sample_shape: tuple[int, ...],
) -> Draws:
    """Draws noise levels, noise and dropped conditions.

    Args:
        objective: how noise levels and dropped conditions are distributed.
        process: a discrete process gets times that are its levels.
        run_key: typed key of the run.
        step: training step, int32.
        positions: [B], the rows' positions in the global batch.
        sample_shape: shape of one example.

    Returns:
        The draws of these rows, whatever other rows are drawn with them.
    """
    time_keys = row_keys(run_key, "time", step, positions)
    if objective.time_sampling == "uniform":
        t = jax.vmap(jax.random.uniform)(time_keys)
    else:
        t = jax.nn.sigmoid(objective.logit_mean + objective.logit_std * jax.vmap(jax.random.normal)(time_keys))
    noise = jax.vmap(lambda key: jax.random.normal(key, sample_shape))(row_keys(run_key, "noise", step, positions))
    label_coin = jax.vmap(jax.random.uniform)(row_keys(run_key, "label_dropout", step, positions))
    noise_coin = jax.vmap(jax.random.uniform)(row_keys(run_key, "noise_dropout", step, positions))
    if objective.dropout == "joint":
        noise_coin = label_coin
    return Draws(
        t=process.nearest_level(t),
        noise=noise,
        drop_label=label_coin < objective.label_dropout,
        drop_noise=noise_coin < objective.noise_dropout,
    )


class Losses(NamedTuple):
    """Losses of each example, float32 [B].

    Attributes:
        total: what is minimised, simple + variational.
        simple: mean squared error of the prediction.
        variational: the term that trains the variance, bits per dimension; None without learned variance.
    """

    total: jax.Array
    simple: jax.Array
    variational: jax.Array | None


def loss(
    objective: Objective, denoiser: Denoiser, params: Params, batch: Mapping[str, jax.Array], draws: Draws
) -> Losses:
    """The losses of a batch.

    With learned variance this is the hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672, equation 16) with weight
    1 on one level's term of the bound, as the public DiT trains (its loss is not rescaled by the number of levels).

    Args:
        objective: the target and its options.
        denoiser: what is trained; its own `params` are not read.
        params: parameters to differentiate.
        batch: "image" [B, ...] and "label" int32 [B].
        draws: the draws of these rows.

    Returns:
        Losses of each example.
    """
    process = denoiser.process
    image = batch["image"].astype(jnp.float32)
    x_t = process.add_noise(image, draws.noise, draws.t)
    prediction = denoiser(
        params, x_t, draws.t, batch["label"], drop_label=draws.drop_label, drop_noise=draws.drop_noise
    )
    value = prediction.value.astype(jnp.float32)
    target = draws.noise if objective.prediction == "noise" else process.velocity(image, draws.noise, draws.t)
    simple = _mean_per_example(jnp.square(value - target))
    if not objective.learn_variance:
        return Losses(simple, simple, None)
    if prediction.variance is None:
        raise UserError("objective.learn_variance is on, but the network has no variance output (model.learn_sigma).")
    data = process.convert(jax.lax.stop_gradient(value), x_t, draws.t, "noise", "data")
    variational = variational_term(process, image, data, prediction.variance.astype(jnp.float32), draws.t)
    if not objective.variance_on_dropped:
        variational = jnp.where(draws.drop_noise, 0.0, variational)
    return Losses(simple + variational, simple, variational)


def variational_term(
    process: Process, image: jax.Array, data: jax.Array, interpolation: jax.Array, t: jax.Array
) -> jax.Array:
    """One level's term of DDPM's variational bound (arXiv 2102.09672, equations 4 to 7), in bits per dimension.

    The divergence of the model's step from the true posterior, or at the first level the negative log-likelihood of
    8-bit data under the model's last step.

    Args:
        process: a process with discrete levels.
        image: true data [B, ...].
        data: the data that the network predicts [B, ...].
        interpolation: the network's variance output [B, ...].
        t: levels [B].

    Returns:
        float32 [B].
    """
    assert process.num_levels is not None
    level = jnp.round(t * process.num_levels).astype(jnp.int32) - 1
    coefficients = AncestralCoefficients(
        *(expand_like(jnp.asarray(table, jnp.float32)[level], image) for table in _level_coefficients(process))
    )
    # Both means share the term in x_t, and at the first level the model's mean is its predicted data.
    mean_error = coefficients.data * (image - data)
    log_variance = coefficients.log_variance(interpolation)
    log_ratio = coefficients.log_variance_min - log_variance
    divergence = 0.5 * (jnp.exp(log_ratio) - 1.0 - log_ratio + jnp.square(mean_error) * jnp.exp(-log_variance))
    nats = jnp.where(
        expand_like(level == 0, image), -_discretised_log_likelihood(image, mean_error, log_variance), divergence
    )
    return _mean_per_example(nats) / math.log(2.0)


@functools.lru_cache(maxsize=8)
def _level_coefficients(process: Process) -> AncestralCoefficients:
    """Coefficients of the step from every level to the one below, float64 [num_levels]."""
    assert process.num_levels is not None
    grid = np.arange(process.num_levels + 1) / process.num_levels
    return ancestral_coefficients(process, grid[1:], grid[:-1], floor_step=(grid[2], grid[1]))


def _discretised_log_likelihood(image: jax.Array, centred: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Logarithm of the probability of the 8-bit bin of `image` in [-1, 1], under a Gaussian `centred` away from it.

    The normal distribution function is the tanh approximation and probabilities are floored at 1e-12, as in the public
    DDPM and DiT code.
    """
    inverse_scale = jnp.exp(-0.5 * log_variance)
    below = _normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    above = _normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    probability = jnp.where(image < -0.999, above, jnp.where(image > 0.999, 1.0 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _mean_per_example(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def bucket_metrics(objective: Objective, losses: Losses, draws: Draws) -> dict[str, jax.Array]:
    """Sums that `summarize_buckets` turns into means; they add over micro-batches, devices and steps.

    Args:
        objective: gives the number of buckets K.
        losses: losses of each example.
        draws: the draws that they belong to.

    Returns:
        "simple" and "count" float32 [2, 2, K], by (label kept, dropped), (noise condition kept, dropped) and interval
        of t, and with learned variance "variational" of the same shape.
    """
    # A level on the edge of two intervals belongs to the lower one, so that discrete levels 1/N ... 1 spread evenly.
    upper_edge = jnp.ceil(draws.t * objective.num_buckets - 1e-4)
    bucket = jnp.clip(upper_edge.astype(jnp.int32) - 1, 0, objective.num_buckets - 1)
    index = (draws.drop_label.astype(jnp.int32), draws.drop_noise.astype(jnp.int32), bucket)
    values = {"count": jnp.ones_like(losses.simple), "simple": losses.simple}
    if losses.variational is not None:
        values["variational"] = losses.variational
    shape = (2, 2, objective.num_buckets)
    return {name: jnp.zeros(shape, jnp.float32).at[index].add(value) for name, value in values.items()}


def summarize_buckets(sums: Mapping[str, Any]) -> dict[str, float]:
    """Means from the sums of `bucket_metrics`, on the host.

    Args:
        sums: the sums, added over whatever is to be averaged.

    Returns:
        "loss/simple" (and "loss/variational"), "loss/noise_kept", "loss/noise_dropped", "loss/label_kept",
        "loss/label_dropped", "dropped/label" and "dropped/noise" (shares of the examples), and per interval i
        "loss_by_level/i" (noise condition kept) and "loss_by_level_noise_dropped/i". All but the variational one are
        means of the simple loss; a mean over no examples is left out.
    """
    arrays = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    count, simple = arrays["count"], arrays["simple"]
    parts: dict[str, tuple[Any, Any]] = {
        "loss/simple": (simple, count),
        "loss/label_kept": (simple[0], count[0]),
        "loss/label_dropped": (simple[1], count[1]),
        "loss/noise_kept": (simple[:, 0], count[:, 0]),
        "loss/noise_dropped": (simple[:, 1], count[:, 1]),
        "dropped/label": (count[1], count),
        "dropped/noise": (count[:, 1], count),
    }
    if "variational" in arrays:
        parts["loss/variational"] = (arrays["variational"], count)
    for i in range(count.shape[-1]):
        parts[f"loss_by_level/{i}"] = (simple[:, 0, i], count[:, 0, i])
        parts[f"loss_by_level_noise_dropped/{i}"] = (simple[:, 1, i], count[:, 1, i])
    return {name: float(total.sum() / n.sum()) for name, (total, n) in parts.items() if n.sum() > 0}
