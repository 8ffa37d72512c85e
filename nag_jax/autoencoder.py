"""The autoencoder behind a latent network: a folder of its weights, read with the hashes that latents are matched by.

A folder holds `vae.safetensors` (our tree, "/" between names) and `vae.json` (name, sizes, hashes), which is written
last. `python -m nag_jax.convert` makes one. The network itself is `models/vae.py`; data and jobs see this file.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from nag_jax import storage
from nag_jax.config import from_section
from nag_jax.denoiser import LatentSpace, Params
from nag_jax.errors import UserError
from nag_jax.models.vae import Vae, VaeConfig, decode_latents, param_shapes
from nag_jax.params_hash import params_hash

VAE_FILE, WEIGHTS_FILE = "vae.json", "vae.safetensors"
ENCODER_PARTS = ("encoder", "quant_conv")


@dataclasses.dataclass(frozen=True)
class VaeDescription:
    """The content of `vae.json`.

    Attributes:
        name: which weights they are, such as "ema" or "mse"; it is kept with everything that is made from them.
        config: sizes and scale.
        fingerprint: content hash of all parameters.
        encoder_hash: of those that make latents; the published "ema" and "mse" share it and differ in the decoder.
    """

    name: str
    config: VaeConfig
    fingerprint: str
    encoder_hash: str


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder with its parameters.

    Attributes:
        description: name, sizes and hashes.
        params: of `Vae(description.config)`.
    """

    description: VaeDescription
    params: Params

    @property
    def latent(self) -> LatentSpace:
        """The space that its scaled latents are in."""
        config = self.description.config
        return LatentSpace(config.scaling_factor, config.downsampling, self.description.encoder_hash)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unscaled moments of images, compiled; arguments and errors as in `Vae.encode_moments`."""
        mean, log_variance = _encode(self.description.config, self.params, images)
        return mean, log_variance

    def decode(self, latents: jax.Array, images_at_once: int = 8) -> jax.Array:
        """Images of scaled latents, compiled; arguments, memory and errors as in `decode_latents`."""
        return _decode(self.description.config, images_at_once, self.params, latents)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: VaeConfig, params: Params, images: jax.Array) -> Any:
    return Vae(config).apply({"params": params}, images, method=Vae.encode_moments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config: VaeConfig, images_at_once: int, params: Params, latents: jax.Array) -> jax.Array:
    return decode_latents(config, params, latents, images_at_once)


def make_autoencoder(name: str, config: VaeConfig, params: Params) -> Autoencoder:
    """An autoencoder of parameters at hand; hashing them takes about a second at SD size."""
    encoder = {part: params[part] for part in ENCODER_PARTS}
    return Autoencoder(VaeDescription(name, config, params_hash(params), params_hash(encoder)), params)


def made_up_autoencoder(config: VaeConfig | None = None) -> Autoencoder:
    """A small autoencoder of random weights, for trying a configuration without the published one."""
    config = config or VaeConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(param_shapes(config))
    params = [0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return make_autoencoder("made-up", config, jax.tree.unflatten(tree, params))


def write_autoencoder(folder: epath.PathLike, autoencoder: Autoencoder) -> None:
    """Writes a folder for `read_autoencoder`.

    Raises:
        NagJaxError: it cannot be written.
    """
    folder = epath.Path(folder)
    (folder / VAE_FILE).unlink(missing_ok=True)
    flat = flatten_dict(jax.tree.map(np.ascontiguousarray, autoencoder.params), sep="/")
    storage.write_bytes(folder / WEIGHTS_FILE, safetensors.numpy.save(flat))
    storage.write_json(folder / VAE_FILE, dataclasses.asdict(autoencoder.description))


def read_autoencoder(folder: epath.PathLike) -> Autoencoder:
    """Reads a converted autoencoder and checks its content.

    Raises:
        UserError: the folder holds none, or a damaged or altered one.
    """
    folder = epath.Path(folder)
    if not (folder / VAE_FILE).exists():
        raise UserError(
            f"{folder} holds no autoencoder: it has no {VAE_FILE}. Make the folder from diffusers' AutoencoderKL with "
            f"python -m nag_jax.convert SOURCE {folder}"
        )
    description = from_section(VaeDescription, storage.read_json(folder / VAE_FILE), str(folder / VAE_FILE))
    try:
        flat = safetensors.numpy.load((folder / WEIGHTS_FILE).read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} is missing or damaged ({error}). Convert it again.") from error
    autoencoder = make_autoencoder(description.name, description.config, unflatten_dict(flat, sep="/"))
    if autoencoder.description != description:
        raise UserError(f"{folder / WEIGHTS_FILE} is not what {VAE_FILE} beside it describes. Convert it again.")
    return autoencoder
