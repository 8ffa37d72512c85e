"""The density p(t | x) of the noise level given a state, as guidance and corrections use it.

A `TimePosterior` is answered by a trained noise-level estimator (a Gaussian in t, below) or exactly by a mixture
(`analytic.py`). Training an estimator is in `nag_jax/noise_shift`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Quadrature nodes stay away from t = 0, where the score is unbounded.
SMALLEST_NODE = 1e-3


class TimePosterior(Protocol):
    """p(t | x). Hashable: the parameters travel apart, as arguments of compiled programs."""

    def log_density(self, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        """log p(t | x) for x [B, ...] and t [B]: [B], normalised over t."""
        ...

    def quadrature(self, params: Any, x: jax.Array, num_nodes: int) -> tuple[jax.Array, jax.Array]:
        """Nodes t [K, B] and weights [K, B] that sum to 1 over K, such that E[g(t) | x] ~ sum_k w_k g(t_k)."""
        ...


@dataclasses.dataclass(frozen=True)
class GaussianTimePosterior:
    """A Gaussian in t whose mean and log variance a network predicts from the state alone.

    Attributes:
        apply: (params, x [B, ...]) -> (mean [B], log_variance [B]).
    """

    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]

    def log_density(self, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        mean, log_variance = self.apply(params, x)
        return -0.5 * ((t - mean) ** 2 * jnp.exp(-log_variance) + log_variance + jnp.log(2.0 * jnp.pi))

    def quadrature(self, params: Any, x: jax.Array, num_nodes: int) -> tuple[jax.Array, jax.Array]:
        """Gauss-Hermite nodes, clipped to [SMALLEST_NODE, 1]."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
        mean, log_variance = self.apply(params, x)
        t = mean + jnp.exp(0.5 * log_variance) * jnp.asarray(nodes, mean.dtype)[:, None]
        weight = jnp.asarray(weights / weights.sum(), mean.dtype)[:, None]
        return jnp.clip(t, SMALLEST_NODE, 1.0), jnp.broadcast_to(weight, t.shape)


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A time posterior with its parameters, as `nag_jax.sample` takes it.

    Attributes:
        posterior: the function.
        params: its parameters, a pytree.
    """

    posterior: TimePosterior
    params: Any
