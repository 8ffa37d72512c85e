"""DiT and SiT networks: from the weights at a source to a folder for `nag_jax.load`, and back to an official file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from nag_jax import loading
from nag_jax.autoencoder import read_autoencoder
from nag_jax.convert import diffusers_dit, tables, torch_file
from nag_jax.convert.source import Source
from nag_jax.denoiser import Params
from nag_jax.errors import UserError


def import_network(
    source: Source,
    kind: tables.Kind | Literal["auto"] = "auto",
    *,
    num_heads: int | None = None,
    init: str | None = None,
    vae: epath.PathLike | None = None,
) -> tuple[loading.ModelDescription, Params]:
    """The network of a source; `loading.write_network` makes a folder of it.

    Args:
        source: from `read_source`: an official network, or diffusers' DiT.
        kind: "dit", "sit", or "auto" for what the file's settings or its name say.
        num_heads: attention heads of an official network of no published size.
        init: how the null noise embedding starts where the source holds none, of `loading.NULL_NOISE_INITS`; None
            for "mean".
        vae: folder of the converted autoencoder that made the training latents; None if it is not known.

    Returns:
        (its description, its parameters on the host).

    Raises:
        UserError: the tensors are those of no such network, or the autoencoder has other latents.
    """
    description, params = _in_our_layout(source, kind, num_heads, init)
    if vae is None:
        return description, params
    autoencoder = read_autoencoder(vae)
    channels, needed = autoencoder.description.config.latent_channels, description.sample_shape[-1]
    if channels != needed:
        raise UserError(f"{vae} makes latents of {channels} channels; the network of {source.path} has {needed}.")
    return dataclasses.replace(description, latent=autoencoder.latent), params


def _in_our_layout(
    source: Source, kind: tables.Kind | Literal["auto"], num_heads: int | None, init: str | None
) -> tuple[loading.ModelDescription, Params]:
    path = str(source.path)
    if source.layout == "autoencoder":
        raise UserError(f"{path} holds an autoencoder, not a DiT or SiT. Leave out --kind={kind}, or give another.")
    if source.layout == "official":
        chosen = recognise_kind(path, source.settings) if kind == "auto" else kind
        description = tables.recognise(source.tensors, chosen, source=path, num_heads=num_heads, init=init)
        return description, tables.import_params(source.tensors, description, source=path)
    if kind == "sit" or num_heads is not None:
        raise UserError(f"{path} is diffusers' DiT, whose config.json says it all. Leave out --kind and --num_heads.")
    if source.config is None:
        raise UserError(f"{path} has diffusers' names, but no config.json beside it. Give the folder with both.")
    description = diffusers_dit.describe(source.config, source=path, init=init)
    official = diffusers_dit.to_official(source.tensors, description, source=path)
    return description, tables.import_params(official, description, source=path)


def export_network(
    source: epath.PathLike,
    target: epath.PathLike,
    kind: tables.Kind,
    *,
    weights: torch_file.Weights = "ema",
    keep_null_noise: bool = False,
) -> None:
    """Writes a network as an official state dict.

    Args:
        source: a converted or training folder.
        target: file to write.
        kind: whose convention the network has.
        weights: "ema", or "model" for the parameters themselves.
        keep_null_noise: also write the null noise embedding.

    Raises:
        UserError: the folder cannot be read, or its network is not of that kind.
    """
    description = loading.read_description(source)
    params = loading.read_params(source, "params" if weights == "model" else weights)
    tensors = tables.export_params(params, description, kind, source=str(source), keep_null_noise=keep_null_noise)
    torch_file.write_state_dict(target, tensors)


def recognise_kind(path: epath.PathLike, settings: Mapping[str, Any]) -> tables.Kind:
    """The kind that a file's settings or else its name say, for names and shapes of both kinds are the same.

    Raises:
        UserError: they say nothing, or a SiT of another path or prediction than the published ones.
    """
    said = {"path_type": "Linear", "prediction": "velocity"}
    for key, value in said.items():
        if settings.get(key, value) != value:
            raise UserError(f"{path} was trained with {key} {settings[key]}; only {value} can be converted.")
    if "path_type" in settings:
        return "sit"
    for text in (str(settings.get("model", "")), epath.Path(path).name):
        found = re.search(r"(?<![a-z])(dit|sit)(?![a-z])", text.lower())
        if found:
            return "dit" if found[1] == "dit" else "sit"
    raise UserError(f"Nothing in {path} or its name tells a DiT from a SiT. Give --kind=dit or --kind=sit.")
