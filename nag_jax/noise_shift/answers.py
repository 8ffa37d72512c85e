"""What a time posterior answers when it is asked for the noise level of states: the mean and variance of p(t | x).

The answers are collected on forward states (`forward_answers`) and, by an observer inside the sampler's program, on
sampled states. Comparing the two is in `measurement.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.diffusion.objective import row_keys
from nag_jax.diffusion.process import Process
from nag_jax.diffusion.time_posterior import Estimator, GaussianTimePosterior, TimePosterior
from nag_jax.errors import UserError
from nag_jax.parallel import to_host

# As many as an exact mixture has levels by default; an estimator's Gaussian needs none.
NUM_NODES = 200


class Answers(NamedTuple):
    """Mean and variance of p(t | x), of one shape: [B], or [times, samples] for a whole measurement."""

    mean: Any
    variance: Any


def answer(posterior: TimePosterior, params: Any, x: jax.Array, num_nodes: int = NUM_NODES) -> Answers:
    """The posterior mean of t, and its variance, for states `x` [B, ...]: [B] each.

    A Gaussian posterior gives its own mean, unclipped; any other is integrated on `num_nodes` quadrature nodes.
    """
    if isinstance(posterior, GaussianTimePosterior):
        mean, log_variance = posterior.apply(params, x)
        return Answers(mean, jnp.exp(log_variance))
    nodes, weights = posterior.quadrature(params, x, num_nodes)
    mean = jnp.sum(weights * nodes, axis=0)
    return Answers(mean, jnp.sum(weights * jnp.square(nodes - mean), axis=0))


@dataclasses.dataclass(frozen=True)
class AnswerObserver:
    """An observer for `Sampler`: asks a time posterior, whose parameters travel as `observer_params`.

    Attributes:
        posterior: what is asked.
        num_nodes: see `answer`.
    """

    posterior: TimePosterior
    num_nodes: int = NUM_NODES

    def __call__(self, params: Any, x: jax.Array, t: jax.Array) -> Answers:
        return answer(self.posterior, params, x, self.num_nodes)


def forward_answers(
    estimator: Estimator,
    process: Process,
    images: np.ndarray,
    times: np.ndarray,
    *,
    seed: int,
    stream: str = "noise_shift_control",
    batch_size: int = 256,
    num_nodes: int = NUM_NODES,
) -> Answers:
    """The answers on forward states alpha_t x_0 + sigma_t eps of given data.

    An image has the same noise eps at all times, so that differences between times are known better than each answer.

    Args:
        estimator: what is asked.
        process: the noising process.
        images: x_0, float32 [N, ...].
        times: [T] in [0, 1].
        seed: with `stream` and an image's index it determines the image's noise.
        stream: name of the noise; two streams are independent.
        batch_size: images per call.
        num_nodes: see `answer`.

    Returns:
        Answers [T, N], float64 on the host.

    Raises:
        UserError: there are no images or no times.
    """
    images, times = np.asarray(images, np.float32), np.asarray(times, np.float32)
    if len(images) == 0 or times.ndim != 1 or len(times) == 0:
        raise UserError(f"Noise levels are asked of {len(images)} images at times of shape {times.shape}: give some.")
    batch_size = min(batch_size, len(images))
    key = jax.random.key(seed, impl="threefry2x32")
    parts = []
    for first in range(0, len(images), batch_size):
        # The last batch is filled up with images that are dropped again: one shape, one program.
        indices = np.arange(first, first + batch_size)
        batch = images[indices % len(images)]
        part = _forward_answers(
            estimator.posterior, process, stream, num_nodes, estimator.params, batch, indices, times, key
        )
        parts.append(jax.tree.map(lambda leaf: leaf.astype(np.float64), to_host(part)))
    return Answers(*(np.concatenate(leaves, axis=1)[:, : len(images)] for leaves in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forward_answers(
    posterior: TimePosterior,
    process: Process,
    stream: str,
    num_nodes: int,
    params: Any,
    x_0: jax.Array,
    indices: jax.Array,
    times: jax.Array,
    key: jax.Array,
) -> Answers:
    noise = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(row_keys(key, stream, 0, indices))

    def at_time(t: jax.Array) -> Answers:
        x = process.add_noise(x_0, noise, jnp.broadcast_to(t, indices.shape))
        return answer(posterior, params, x, num_nodes)

    return jax.lax.map(at_time, times)
