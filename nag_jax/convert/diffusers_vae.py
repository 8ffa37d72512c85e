"""Diffusers' `AutoencoderKL` to a folder for `nag_jax.autoencoder`; the table of tensors is `models/vae_table.py`."""

from __future__ import annotations

import re

from etils import epath

from nag_jax.autoencoder import VaeDescription, make_autoencoder, write_autoencoder
from nag_jax.convert.source import WEIGHTS, Source
from nag_jax.errors import UserError
from nag_jax.models.vae_table import config_from_diffusers, config_from_state_dict, from_torch_state_dict


def import_autoencoder(source: Source, target: epath.PathLike, name: str | None = None) -> VaeDescription:
    """Writes an autoencoder as a folder for `nag_jax.autoencoder.read_autoencoder`.

    Args:
        source: from `read_source`; without a config.json the size is read from the shapes, and the scale and the
            groups of the norms are those of Stable Diffusion.
        target: folder to make.
        name: which weights they are; None for what `recognise_name` says.

    Returns:
        The description that was written.

    Raises:
        UserError: these are no tensors of an AutoencoderKL that can be converted.
    """
    if source.layout != "autoencoder":
        raise UserError(f"{source.path} holds no autoencoder. Give diffusers' AutoencoderKL, or leave out --kind=vae.")
    try:
        config = config_from_diffusers(source.config) if source.config else config_from_state_dict(source.tensors)
        params = from_torch_state_dict(source.tensors, config)
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from error
    autoencoder = make_autoencoder(name or recognise_name(source.path), config, params)
    write_autoencoder(target, autoencoder)
    return autoencoder.description


def recognise_name(path: epath.PathLike) -> str:
    """Which weights a path says these are: "ema" or "mse" as in sd-vae-ft-ema, else the last name that tells anything.

    What all autoencoders have in their paths, diffusers' file name and a pipeline's folder vae/, tells nothing.
    """
    path = epath.Path(path).resolve()
    names = [path.stem if path.is_file() else path.name, *(folder.name for folder in path.parents)]
    for name in names:
        found = re.search(r"vae.*?(?<![a-z])(ema|mse)(?![a-z])", name.lower())
        if found:
            return found[1]
    return next((name for name in names if name and name != "vae" and not name.startswith(WEIGHTS)), "vae")
