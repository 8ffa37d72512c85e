"""A convolution with a frozen batch normalisation, of which the pretrained feature nets are made.

The statistics are parameters like any other: nothing is estimated from a batch, and there is no training mode.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-3


class FrozenBatchNorm(nn.Module):
    """[..., C] -> (x - mean) / sqrt(var + 1e-3) * scale + bias, with parameters scale, bias, mean and var of [C]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + NORM_EPSILON)) + bias


class ConvNorm(nn.Module):
    """Convolution without bias, frozen batch normalisation, activation; float32 at the highest precision.

    Attributes:
        features: channels of the result.
        kernel: height and width.
        stride: of both axes.
        padding: "SAME" as in TensorFlow (the odd pixel at the end), or "VALID".
        groups: 1, or the number of channels for a depthwise convolution.
        activation: what follows the normalisation; None for nothing.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            feature_group_count=self.groups,
            use_bias=False,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        x = FrozenBatchNorm(name="bn")(x)
        return x if self.activation is None else self.activation(x)
