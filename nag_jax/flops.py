"""How many floating-point operations the networks take, counted by hand from their sizes.

A multiply-add is two operations. Counted are matrix products and convolutions, those of attention included; left out
are norms, activations and other elementwise work, under 1 % together, and whatever a program computes twice
(rematerialisation). The "Gflops" of the DiT paper (arXiv 2212.09748, table 4) are multiply-adds: half of these.
Nothing here runs a network or knows a device.
"""

from __future__ import annotations

from nag_jax.models.dit import ModelConfig
from nag_jax.models.layers import FREQUENCIES, MLP_RATIO
from nag_jax.models.vae import VaeConfig

PASSES_OF_TRAINING = 3  # forward, and backward to the inputs and to the weights of every product


def dit_forward(config: ModelConfig, sample_shape: tuple[int, ...]) -> int:
    """Operations of one evaluation of the transformer on one state.

    Args:
        config: the network.
        sample_shape: (H, W, C) of a state.

    Returns:
        FLOP.
    """
    height, width, channels = sample_shape
    depth, hidden, _ = config.dimensions()
    tokens = (height // config.patch_size) * (width // config.patch_size)
    patch = config.patch_size**2 * channels
    projections = (3 + 1 + 2 * MLP_RATIO) * tokens * hidden**2  # qkv, proj, fc1 and fc2
    attention = 2 * tokens**2 * hidden  # products with keys and with values, all heads together
    modulation = 6 * hidden**2
    embeddings = tokens * patch * hidden + FREQUENCIES * hidden + hidden**2
    final_layer = 2 * hidden**2 + tokens * hidden * patch * (2 if config.learn_sigma else 1)
    return 2 * (depth * (projections + attention + modulation) + embeddings + final_layer)


def dit_training(config: ModelConfig, sample_shape: tuple[int, ...]) -> int:
    """Operations that one image of a training step needs: three forward passes; arguments as in `dit_forward`."""
    return PASSES_OF_TRAINING * dit_forward(config, sample_shape)


def dit_sampling(config: ModelConfig, sample_shape: tuple[int, ...], evaluations_per_image: int) -> int:
    """Operations of one sampled state.

    Args:
        config: the network.
        sample_shape: (H, W, C) of a state.
        evaluations_per_image: network evaluations, all steps and branches together (`Samples.evaluations_per_image`).

    Returns:
        FLOP.
    """
    return evaluations_per_image * dit_forward(config, sample_shape)


def vae_encode(config: VaeConfig, height: int, width: int) -> int:
    """Operations of encoding one image.

    Args:
        config: the autoencoder.
        height: rows of the image, a multiple of `config.downsampling`.
        width: columns of the image, likewise.

    Returns:
        FLOP.
    """
    widths = config.block_out_channels
    positions = height * width
    total = positions * _conv(config.channels, widths[0])
    features = widths[0]
    for level, wide in enumerate(widths):
        total += positions * _resnet_blocks(features, wide, config.layers_per_block)
        features = wide
        if level < len(widths) - 1:
            positions //= 4
            total += positions * _conv(wide, wide)
    moments = 2 * config.latent_channels
    total += _mid_block(positions, features)
    return total + positions * (_conv(features, moments) + _conv(moments, moments, kernel_size=1))


def vae_decode(config: VaeConfig, height: int, width: int) -> int:
    """Operations of decoding to one image of height x width pixels; arguments as in `vae_encode`."""
    widths = config.block_out_channels[::-1]
    latent = config.latent_channels
    positions = (height // config.downsampling) * (width // config.downsampling)
    features = widths[0]
    total = positions * (_conv(latent, latent, kernel_size=1) + _conv(latent, features))
    total += _mid_block(positions, features)
    for level, wide in enumerate(widths):
        total += positions * _resnet_blocks(features, wide, config.layers_per_block + 1)
        features = wide
        if level < len(widths) - 1:
            positions *= 4
            total += positions * _conv(wide, wide)
    return total + positions * _conv(features, config.channels)


def _conv(inputs: int, outputs: int, kernel_size: int = 3) -> int:
    """Operations for each position of the output; padding counts as if it were multiplied."""
    return 2 * kernel_size**2 * inputs * outputs


def _resnet_blocks(inputs: int, outputs: int, count: int) -> int:
    """Operations for each position of `count` residual blocks, of which the first changes the width."""
    shortcut = _conv(inputs, outputs, kernel_size=1) if inputs != outputs else 0
    return _conv(inputs, outputs) + shortcut + (2 * count - 1) * _conv(outputs, outputs)


def _mid_block(positions: int, features: int) -> int:
    """Two residual blocks with attention of one head between them."""
    attention = 4 * _conv(features, features, kernel_size=1) + 4 * positions * features
    return positions * (2 * _resnet_blocks(features, features, 1) + attention)
