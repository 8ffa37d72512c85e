"""The noise-level estimator g(t | x): what level does a state look like, judged from the state alone?

The denoiser's trunk with its noise input held null and its class null, under a small head that predicts a
mean and a log variance of t (arXiv 2510.12497 fine-tunes a denoiser with a changed last layer; pooling and
the variance are our choices). Training it and turning it into a density or a posterior happen elsewhere.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nag_jax.models.dit import DiT, Params
from nag_jax.models.layers import layer_norm

# Standard deviations from 1.2e-4, finer than any grid of levels in use, to 2.7; no law on [0, 1] exceeds .5.
LOG_VARIANCE_RANGE = (-18.0, 2.0)


def _uniform_t_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Mean and log variance of t uniform in [0, 1]: the best answer before anything is learned."""
    return jnp.array([0.5, math.log(1 / 12)], dtype)


class NoiseEstimator(nn.Module):
    """Mean and log variance of t given the state; build it with `build_estimator`.

    Attributes:
        trunk: the denoiser's network; only its `null_conditioning` and `features` are used.
    """

    trunk: DiT

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Estimate the noise level of states.

        Args:
            x: [B, H, W, C] states.

        Returns:
            mean: float32 [B], an estimate of t (not confined to [0, 1]).
            log_variance: float32 [B], clipped to LOG_VARIANCE_RANGE.
        """
        tokens = self.trunk.features(x, self.trunk.null_conditioning(x.shape[0]))
        head = nn.Dense(
            2,
            precision=jax.lax.Precision.HIGHEST,
            kernel_init=nn.initializers.zeros,
            bias_init=_uniform_t_init,
            name="head",
        )
        answer = head(layer_norm(tokens).mean(axis=1))
        return answer[:, 0], jnp.clip(answer[:, 1], *LOG_VARIANCE_RANGE)


def build_estimator(model: DiT) -> NoiseEstimator:
    """The estimator over a denoiser's network, in float32 at the highest precision whatever `model` says."""
    return NoiseEstimator(model.clone(dtype="float32", precision="highest", attention="xla"))


def estimator_params(trunk_params: Params, key: jax.Array, model: NoiseEstimator) -> Params:
    """The estimator's parameters at the start of its training: the denoiser's trunk and a fresh head.

    Args:
        trunk_params: parameters of the trained denoiser, in the block layout of `model.trunk`.
        key: a PRNG key for the head.
        model: from `build_estimator`.

    Returns:
        {"trunk": the denoiser's parameters without final layer and time MLP, which the estimator never calls,
        "head": fresh}.

    Raises:
        ValueError: `trunk_params` lack a part that the trunk needs, such as blocks in the other layout.
    """

    def init(key: jax.Array) -> Params:
        return model.init(key, jnp.zeros((1, *model.trunk.input_shape)))["params"]

    needed = jax.eval_shape(init, key)["trunk"]
    missing = sorted(set(needed) - set(trunk_params))
    if missing:
        raise ValueError(
            f"estimator_params: {', '.join(missing)} not among the parameters {sorted(trunk_params)}; "
            "stack_blocks and unstack_blocks convert between the two layouts of blocks."
        )
    # Under jit the trunk's own initialisation is dead code and costs nothing.
    head = jax.jit(lambda key: init(key)["head"])(key)
    return {"trunk": {name: trunk_params[name] for name in needed}, "head": head}
