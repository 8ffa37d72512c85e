"""The parts of the diffusion transformer: embeddings, patches, attention and the adaLN-Zero block.

Written after Peebles & Xie (arXiv 2212.09748, section 3 and appendix A); `dit` puts them together. Submodules
carry the names of the official state dict.
"""

import contextlib
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nag_jax.models.attention import AttentionName, attention

FREQUENCIES = 256  # width of the sinusoidal time features
MAX_PERIOD = 10_000.0
MLP_RATIO = 4
NORM_EPSILON = 1e-6
NORM_STATISTICS = "norm_statistics"  # the name by which rematerialisation may keep a norm's means and variances
GELU_SCALE, GELU_CUBE = (2 / math.pi) ** 0.5, 0.044715
PRECISIONS = {"default": None, "highest": jax.lax.Precision.HIGHEST}

normal_init = nn.initializers.normal(0.02)
_xavier_init = nn.initializers.xavier_uniform()
_zeros_init = nn.initializers.zeros


def sincos_positions(height: int, width: int, hidden_size: int) -> np.ndarray:
    """Fixed 2-D sine-cosine position embedding of a grid of tokens.

    Each half of the vector is [sin(p ω), cos(p ω)] with ω_i = 10000^(-i / (hidden_size / 4)); as in the
    official networks the *first* half encodes the column and the second the row.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        hidden_size: width of a token, a multiple of 4.

    Returns:
        float32 [height * width, hidden_size], tokens in row-major order.
    """
    omega = MAX_PERIOD ** (-np.arange(hidden_size // 4) / (hidden_size // 4))

    def embed(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = np.mgrid[:height, :width]
    return np.concatenate([embed(column), embed(row)], axis=1).astype(np.float32)


def time_features(time: jax.Array) -> jax.Array:
    """Sinusoidal features [cos(time ω), sin(time ω)] of the network's time input, ω_i = 10000^(-i / 128).

    Args:
        time: [B], in the network's own unit; fractions are allowed.

    Returns:
        float32 [B, 256].
    """
    half = FREQUENCIES // 2
    omega = (MAX_PERIOD ** (-np.arange(half) / half)).astype(np.float32)
    angle = time.astype(jnp.float32)[:, None] * omega
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] to tokens [B, (H/p)(W/p), p·p·C], each in (row, column, channel) order."""
    batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(batch, height // p, p, width // p, p, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(tokens: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """The inverse of `patchify`: [B, (H/p)(W/p), p·p·C] to [B, H, W, C]."""
    p = patch_size
    x = tokens.reshape(tokens.shape[0], height // p, width // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(tokens.shape[0], height, width, -1)


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation over the last axis without affine parameters, in and to float32."""
    x = x.astype(jnp.float32)
    mean = checkpoint_name(x.mean(axis=-1, keepdims=True), NORM_STATISTICS)
    variance = checkpoint_name(jnp.square(x - mean).mean(axis=-1, keepdims=True), NORM_STATISTICS)
    return (x - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: x (1 + scale) + shift; x [B, T, hidden], shift and scale [B, hidden]."""
    return x * (1 + scale[:, None]) + shift[:, None]


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation, x (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³); float32 inside."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # (1 + tanh u) / 2 is the sigmoid of 2u. With a tanh in the slope too, both would share it, and XLA wrote what
    # is shared to a GPU's memory, where writing and reading cost more than computing it twice.
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(2 * GELU_SCALE * (wide + GELU_CUBE * wide**3))
    slope = sigmoid * (1 + wide * (1 - sigmoid) * 2 * GELU_SCALE * (1 + 3 * GELU_CUBE * wide**2))
    return gelu(x), (slope * tangent).astype(x.dtype)


def linear(
    features: int, dtype: str, precision: str, *, kernel_init: Any = _xavier_init, name: str | None = None
) -> nn.Dense:
    """A Dense layer with the project's names for dtype and precision; the bias starts at zero."""
    lax_precision = PRECISIONS[precision]
    return nn.Dense(features, dtype=dtype, precision=lax_precision, kernel_init=kernel_init, name=name)


class TimeEmbedding(nn.Module):
    """Noise level to a vector, in float32 at the highest precision: a rounded level is another level."""

    hidden_size: int

    @nn.compact
    def __call__(self, time: jax.Array) -> jax.Array:
        mlp_0 = linear(self.hidden_size, "float32", "highest", kernel_init=normal_init, name="mlp_0")
        mlp_2 = linear(self.hidden_size, "float32", "highest", kernel_init=normal_init, name="mlp_2")
        return mlp_2(nn.silu(mlp_0(time_features(time))))


class SelfAttention(nn.Module):
    """Multi-head self-attention; the fused projection's outputs are ordered (q, k, v) x heads x head_dim."""

    num_heads: int
    dtype: str
    precision: str
    attention: AttentionName

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, hidden = x.shape
        qkv = linear(3 * hidden, self.dtype, self.precision, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.num_heads, hidden // self.num_heads), 2, 0)
        # Attention has no precision argument; it reads the ambient default while it is traced.
        highest = self.precision == "highest"
        with jax.default_matmul_precision("highest") if highest else contextlib.nullcontext():
            y = attention(self.attention, q, k, v)
        return linear(hidden, self.dtype, self.precision, name="proj")(y.reshape(batch, tokens, hidden))


class Mlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    dtype: str
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x.shape[-1]
        y = linear(MLP_RATIO * hidden, self.dtype, self.precision, name="fc1")(x)
        return linear(hidden, self.dtype, self.precision, name="fc2")(gelu(y))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning: it starts as the identity."""

    num_heads: int
    dtype: str
    precision: str
    attention: AttentionName

    @nn.compact
    def __call__(self, x: jax.Array, conditioning: jax.Array) -> jax.Array:
        modulation = linear(
            6 * x.shape[-1], self.dtype, self.precision, kernel_init=_zeros_init, name="adaLN_modulation"
        )
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            modulation(nn.silu(conditioning)), 6, axis=-1
        )
        y = modulate(layer_norm(x), shift_msa, scale_msa)
        attn = SelfAttention(self.num_heads, self.dtype, self.precision, self.attention, name="attn")
        x = x + gate_msa[:, None] * attn(y)
        y = modulate(layer_norm(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * Mlp(self.dtype, self.precision, name="mlp")(y)


class FinalLayer(nn.Module):
    """Tokens to patches of the output, in float32: it costs little and the output is not rounded."""

    features: int
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array, conditioning: jax.Array) -> jax.Array:
        modulation = linear(
            2 * x.shape[-1], "float32", self.precision, kernel_init=_zeros_init, name="adaLN_modulation"
        )
        shift, scale = jnp.split(modulation(nn.silu(conditioning)), 2, axis=-1)
        y = modulate(layer_norm(x), shift, scale)
        return linear(self.features, "float32", self.precision, kernel_init=_zeros_init, name="linear")(y)
