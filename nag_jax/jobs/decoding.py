"""From a sampler's states to images: a change of range for networks on images, the decoder of a VAE for latents."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from nag_jax.autoencoder import Autoencoder, VaeDescription, made_up_autoencoder, read_autoencoder
from nag_jax.data.images import to_uint8
from nag_jax.data.sources import DataConfig
from nag_jax.denoiser import LatentSpace, Params
from nag_jax.errors import UserError
from nag_jax.loading import check_latent
from nag_jax.models.vae import decode_latents
from nag_jax.parallel import local_mesh, local_sharding, place, replicated, row_by_row

IMAGES_AT_ONCE = 8  # decoded together on a device: about 2 GiB of activations at 256 x 256 pixels


class Decoder:
    """Decodes states, each device its own rows of a batch.

    Args:
        config: `vae` and `mock_examples` are read.
        latent: what the states are latents of; None for images.
        mesh: the devices.
        network: what error messages call the network.

    Attributes:
        vae: the autoencoder in use; None for images.

    Raises:
        UserError: there is no autoencoder, or it is not that of the network's latents.
    """

    def __init__(self, config: DataConfig, latent: LatentSpace | None, mesh: Mesh, network: str) -> None:
        self.vae: VaeDescription | None = None
        self._params: Params = None
        self._host_params: Params = None
        decode: Callable[[Params, jax.Array], jax.Array] = _change_range
        if latent is not None:
            autoencoder = open_autoencoder(config)
            check_latent(latent, autoencoder.latent, network)
            self.vae = autoencoder.description
            self._host_params = autoencoder.params
            self._params = place(autoencoder.params, replicated(mesh))
            decode = functools.partial(_decode_latents, self.vae)
        self._decode = row_by_row(decode, mesh)
        self._decode_locally = row_by_row(decode, local_mesh())

    def __call__(self, states: jax.Array) -> jax.Array:
        """Images of states.

        Args:
            states: [B, ...], rows over the mesh's data and fsdp axes; B divides over them.

        Returns:
            uint8 [B, H, W, C] on the devices.
        """
        return self._decode(self._params, states)

    def decode_all(self, states: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, C] of any number of states [N, ...] on the host, a bounded number at a time.

        On this process' own devices: one of several may call it alone.
        """
        if self.vae is None:
            return to_uint8(states)
        params = jax.device_put(self._host_params, local_sharding())
        batch_size = IMAGES_AT_ONCE * jax.local_device_count()
        images = []
        for first in range(0, len(states), batch_size):
            indices = np.arange(first, first + batch_size) % len(states)
            placed = jax.device_put(states[indices], local_sharding("data"))
            images.append(np.asarray(self._decode_locally(params, placed)))
        return np.concatenate(images)[: len(states)]


def open_autoencoder(config: DataConfig) -> Autoencoder:
    """The autoencoder in the folder `config.vae`; where the data are made up and none is named, a made-up one.

    Raises:
        UserError: none is named, or it cannot be read.
    """
    if config.vae:
        return read_autoencoder(config.vae)
    if config.mock_examples:
        return made_up_autoencoder()
    raise UserError(
        "The network works on latents, and nothing decodes its samples: set config.data.vae to the folder of a "
        "converted autoencoder (python -m nag_jax.convert SOURCE FOLDER)."
    )


def _change_range(params: None, states: jax.Array) -> jax.Array:
    return to_uint8(states)


def _decode_latents(vae: VaeDescription, params: Params, states: jax.Array) -> jax.Array:
    return to_uint8(decode_latents(vae.config, params, states, IMAGES_AT_ONCE))
