"""The Stable Diffusion autoencoder (SD-VAE): images to latents and back.

The network is the KL-regularised autoencoder of Rombach et al. (arXiv 2112.10752, appendix G), in float32 at the
highest precision throughout. Submodules carry the names of diffusers' `AutoencoderKL`; `vae_table` carries its tensors
over. The module neither draws noise nor knows the latent's scale: `sample_latent` and `decode_latents` below are the
only places that do. Training the autoencoder is no part of this.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nag_jax.errors import UserError

HIGHEST = jax.lax.Precision.HIGHEST
NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Size of the autoencoder; the defaults are those of Stable Diffusion's, which DiT and SiT use.

    Attributes:
        channels: channels of an image.
        latent_channels: channels of a latent.
        block_out_channels: width of each resolution, finest first; each after the first halves the resolution.
        layers_per_block: residual blocks of a resolution in the encoder; the decoder has one more.
        norm_groups: groups of every group normalisation; divides every width.
        scaling_factor: what a latent is multiplied by before the diffusion model sees it.
    """

    channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        sizes = (self.channels, self.latent_channels, *self.block_out_channels, self.layers_per_block, self.norm_groups)
        if not self.block_out_channels or min(sizes) < 1 or not self.scaling_factor > 0:
            raise UserError(f"VAE: every size and the scaling factor must be positive, got {self}.")
        if any(width % self.norm_groups for width in self.block_out_channels):
            raise UserError(
                f"VAE: norm_groups={self.norm_groups} does not divide every width in {list(self.block_out_channels)}."
            )

    @property
    def downsampling(self) -> int:
        """Pixels of an image per side of one latent position."""
        return 2 ** (len(self.block_out_channels) - 1)


def _conv(features: int, kernel_size: int, name: str) -> nn.Conv:
    size = (kernel_size, kernel_size)
    return nn.Conv(features, size, padding=kernel_size // 2, dtype=jnp.float32, precision=HIGHEST, name=name)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=jnp.float32, precision=HIGHEST, name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    # The fast variance E[x²] - E[x]² cancels where a channel's mean is large.
    return nn.GroupNorm(groups, epsilon=NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, added to the input or to its 1x1 projection where the width changes."""

    features: int
    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _conv(self.features, 3, "conv1")(nn.silu(_norm(self.norm_groups, "norm1")(x)))
        y = _conv(self.features, 3, "conv2")(nn.silu(_norm(self.norm_groups, "norm2")(y)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "conv_shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions, added to the input."""

    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        y = _norm(self.norm_groups, "group_norm")(x).reshape(batch, height * width, channels)
        q, k, v = (_dense(channels, name)(y) for name in ("to_q", "to_k", "to_v"))
        weights = nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k, precision=HIGHEST) * channels**-0.5)
        y = _dense(channels, "to_out_0")(jnp.einsum("bqk,bkc->bqc", weights, v, precision=HIGHEST))
        return x + y.reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(x.shape[-1], self.norm_groups, name="resnets_0")(x)
        x = AttentionBlock(self.norm_groups, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.norm_groups, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves the resolution by a strided 3x3 convolution, padded by one pixel at the bottom and the right only."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((0, 1), (0, 1))
        conv = nn.Conv(x.shape[-1], (3, 3), (2, 2), padding=padding, dtype=jnp.float32, precision=HIGHEST, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then convolves."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _conv(x.shape[-1], 3, "conv")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class DownBlock(nn.Module):
    """The encoder's residual blocks at one resolution."""

    features: int
    num_layers: int
    norm_groups: int
    downsample: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.norm_groups, name=f"resnets_{i}")(x)
        return Downsample(name="downsamplers_0")(x) if self.downsample else x


class UpBlock(nn.Module):
    """The decoder's residual blocks at one resolution."""

    features: int
    num_layers: int
    norm_groups: int
    upsample: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.norm_groups, name=f"resnets_{i}")(x)
        return Upsample(name="upsamplers_0")(x) if self.upsample else x


class Encoder(nn.Module):
    """Images to features with two channels for each channel of a latent."""

    config: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_groups
        widths = config.block_out_channels
        x = _conv(widths[0], 3, "conv_in")(x)
        for i, width in enumerate(widths):
            downsample = i < len(widths) - 1
            x = DownBlock(width, config.layers_per_block, groups, downsample, name=f"down_blocks_{i}")(x)
        x = MidBlock(groups, name="mid_block")(x)
        return _conv(2 * config.latent_channels, 3, "conv_out")(nn.silu(_norm(groups, "conv_norm_out")(x)))


class Decoder(nn.Module):
    """Latents to images."""

    config: VaeConfig

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_groups
        widths = config.block_out_channels[::-1]
        x = MidBlock(groups, name="mid_block")(_conv(widths[0], 3, "conv_in")(z))
        for i, width in enumerate(widths):
            upsample = i < len(widths) - 1
            x = UpBlock(width, config.layers_per_block + 1, groups, upsample, name=f"up_blocks_{i}")(x)
        return _conv(config.channels, 3, "conv_out")(nn.silu(_norm(groups, "conv_norm_out")(x)))


class Vae(nn.Module):
    """The autoencoder; apply it with `method=Vae.encode_moments` or `method=Vae.decode`."""

    config: VaeConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv(2 * self.config.latent_channels, (1, 1), dtype=jnp.float32, precision=HIGHEST)
        self.post_quant_conv = nn.Conv(self.config.latent_channels, (1, 1), dtype=jnp.float32, precision=HIGHEST)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Reconstructs images from the mean of their latents; it touches every parameter."""
        return self.decode(self.encode_moments(x)[0])

    def encode_moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The Gaussian of the unscaled latents of images.

        Args:
            x: float [B, H, W, channels] in [-1, 1]; H and W are multiples of `config.downsampling`.

        Returns:
            (mean, log-variance in [-30, 20]), both float32 [B, H / downsampling, W / downsampling, latent_channels].

        Raises:
            UserError: another shape.
        """
        factor = self.config.downsampling
        if x.ndim != 4 or x.shape[-1] != self.config.channels or x.shape[1] % factor or x.shape[2] % factor:
            raise UserError(
                f"VAE: images are {list(x.shape)}; expected [B, H, W, {self.config.channels}] with H and W multiples "
                f"of {factor}."
            )
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, z: jax.Array) -> jax.Array:
        """Images of unscaled latents.

        Args:
            z: float [B, h, w, latent_channels], unscaled.

        Returns:
            float32 [B, h * downsampling, w * downsampling, channels], about in [-1, 1] but not clipped.

        Raises:
            UserError: another shape.
        """
        if z.ndim != 4 or z.shape[-1] != self.config.latent_channels:
            raise UserError(f"VAE: latents are {list(z.shape)}; expected [B, h, w, {self.config.latent_channels}].")
        return self.decoder(self.post_quant_conv(z))


def param_shapes(config: VaeConfig) -> Any:
    """The parameter tree of the autoencoder, as `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    image = jnp.zeros((1, config.downsampling, config.downsampling, config.channels))
    return jax.eval_shape(Vae(config).init, jax.random.key(0), image)["params"]


def sample_latent(scaling_factor: float, mean: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """A scaled latent from its moments: scaling_factor (mean + exp(log_variance / 2) noise).

    Args:
        scaling_factor: of the latent space, `VaeConfig.scaling_factor`.
        mean, log_variance: unscaled, from `Vae.encode_moments`; half precision is taken to float32 first.
        noise: standard normal, of the same shape; zeros give the scaled mean.

    Returns:
        float32 of the same shape, what the diffusion model is trained on.
    """
    mean, log_variance, noise = (array.astype(jnp.float32) for array in (mean, log_variance, noise))
    return scaling_factor * (mean + jnp.exp(0.5 * log_variance) * noise)


def decode_latents(config: VaeConfig, params: Any, latents: jax.Array, images_at_once: int = 8) -> jax.Array:
    """Images of scaled latents, `images_at_once` at a time, so that peak memory does not grow with the batch.

    It can be traced. Each group of images is one iteration of the same compiled loop.

    Args:
        config: size and scale.
        params: of `Vae(config)`.
        latents: float [B, h, w, latent_channels], as the diffusion model makes them.
        images_at_once: bound on the images whose activations are alive together, at least 1; at the default size
            each takes about 0.22 GiB at 256 x 256 pixels, as XLA compiles it for a CPU.

    Returns:
        float32 [B, h * downsampling, w * downsampling, channels], not clipped.

    Raises:
        UserError: latents of another shape, or images_at_once below 1.
    """
    if images_at_once < 1:
        raise UserError(f"VAE: images_at_once must be at least 1, got {images_at_once}.")

    def decode(group: jax.Array) -> jax.Array:
        z = group.astype(jnp.float32) / config.scaling_factor
        return jnp.asarray(Vae(config).apply({"params": params}, z, method=Vae.decode))

    count = latents.shape[0]
    if count <= images_at_once:
        return decode(latents)
    padding = -count % images_at_once
    padded = jnp.pad(latents, [(0, padding)] + [(0, 0)] * (latents.ndim - 1))
    groups = padded.reshape(-1, images_at_once, *latents.shape[1:])
    images = jax.lax.map(decode, groups)
    return images.reshape(-1, *images.shape[2:])[:count]
