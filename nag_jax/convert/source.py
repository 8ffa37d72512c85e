"""Reads what lies at the SOURCE of a conversion: a weight file, or diffusers' folder of one model or a whole pipeline.

The numbers, and what was written beside them, are found here. What they mean is `tables.py`'s, `diffusers_dit.py`'s
and `models/vae_table.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.autoencoder import VAE_FILE
from nag_jax.convert import safetensors_file, torch_file
from nag_jax.errors import UserError
from nag_jax.loading import MODEL_FILE

Layout: TypeAlias = Literal["official", "diffusers dit", "autoencoder", "feature net"]
Part: TypeAlias = Literal["network", "autoencoder"]
CONFIG_FILE = "config.json"
WEIGHTS = "diffusion_pytorch_model"  # how diffusers names the weights of every model
WEIGHT_FILES = tuple(f"{WEIGHTS}.{end}" for end in ("safetensors", "safetensors.index.json", "bin", "bin.index.json"))
FEATURE_NET_STEMS = ("Conv2d_1a_3x3.conv.weight", "_conv_stem.weight")  # of Inception and EfficientNet
PIPELINE_FOLDERS: dict[Part, str] = {"network": "transformer", "autoencoder": "vae"}


class Source(NamedTuple):
    """Weights and what is said about them.

    Attributes:
        path: the file or the folder of one model.
        tensors: arrays by name.
        config: content of diffusers' config.json; None for other weights.
        settings: command-line settings in an official training checkpoint.
    """

    path: epath.Path
    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any] | None
    settings: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        """Whose names the tensors have."""
        return recognise_layout(self.tensors)


def recognise_layout(names: Iterable[str]) -> Layout:
    """Whose names these are: what is none of the others is taken for an official network."""
    for name in names:
        if name in FEATURE_NET_STEMS:
            return "feature net"
        if name.startswith(("encoder.", "decoder.", "first_stage_model.")):
            return "autoencoder"
        if name.startswith("transformer_blocks."):
            return "diffusers dit"
    return "official"


def read_source(
    path: epath.PathLike,
    *,
    weights: torch_file.Weights = "ema",
    part: Part | None = None,
) -> Source:
    """Reads a source.

    Args:
        path: a weight file, diffusers' folder of a model, or one of a pipeline.
        weights: which weights of a training checkpoint.
        part: which model of a pipeline; None for the network, or the autoencoder where there is no network.

    Returns:
        The Source, its tensors in memory.

    Raises:
        UserError: there is nothing to read, or it is damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a weight file or a folder of diffusers.")
    if not path.is_dir():
        is_diffusers = path.name.startswith(WEIGHTS) and (path.parent / CONFIG_FILE).exists()
        config = storage.read_json(path.parent / CONFIG_FILE) if is_diffusers else None
        settings = {} if path.suffix == ".safetensors" else torch_file.settings(path)
        return Source(path, read_weight_file(path, weights), config, settings)
    for file in (MODEL_FILE, VAE_FILE):
        if (path / file).exists():
            raise UserError(f"{path} is a folder of this project already: it has {file}. --to writes a network's.")
    folder = _model_folder(path, part)
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} has no {CONFIG_FILE} of diffusers. Give such a folder, or a weight file itself.")
    return Source(folder, _read_folder(folder), storage.read_json(folder / CONFIG_FILE), {})


def read_weight_file(path: epath.PathLike, weights: torch_file.Weights = "ema") -> dict[str, np.ndarray]:
    """The tensors of a file of either format, which its name tells.

    Raises:
        UserError: the file is damaged, or of neither format.
    """
    path = epath.Path(path)
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to a file that Git LFS keeps. Fetch the file itself (git lfs pull).")
    return safetensors_file.state_dict(path) if path.suffix == ".safetensors" else torch_file.state_dict(path, weights)


def _model_folder(path: epath.Path, part: Part | None) -> epath.Path:
    """The folder of one model: `path` itself, or a folder in it if it is a pipeline's."""
    if not (path / "model_index.json").exists():
        return path
    for name in [PIPELINE_FOLDERS[part]] if part else PIPELINE_FOLDERS.values():
        if (path / name).is_dir():
            return path / name
    wanted = PIPELINE_FOLDERS[part] if part else " or ".join(PIPELINE_FOLDERS.values())
    raise UserError(f"{path} is the folder of a pipeline without {wanted}/. Give the folder of the model itself.")


def _read_folder(folder: epath.Path) -> dict[str, np.ndarray]:
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return _read_shards(folder / name) if name.endswith(".json") else read_weight_file(folder / name)
    others = ", ".join(sorted(file.name for file in folder.iterdir() if WEIGHTS in file.name)) or "no weights at all"
    raise UserError(f"{folder} has {others}, but none of {', '.join(WEIGHT_FILES)}. Give weights in float32.")


def _read_shards(index: epath.Path) -> dict[str, np.ndarray]:
    """Weights in several files; the index says which tensor lies where."""
    content = storage.read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) and "/" not in file for file in places.values()):
        raise UserError(f"{index} is damaged: it does not say in which files the tensors are. Fetch it again.")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        if not (index.parent / file).exists():
            raise UserError(f"{index.parent / file} is missing, in which {index.name} has tensors. Fetch it.")
        shard = read_weight_file(index.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        if shard.keys() != wanted:
            differing = sorted(shard.keys() ^ wanted)[0]
            raise UserError(f"{index.parent / file} and {index.name} disagree about tensor {differing}. Fetch both.")
        tensors |= shard
    return tensors
