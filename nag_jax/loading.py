"""From a folder to a Denoiser: `model.json` says what the network is, a checkpoint holds its weights.

A training folder writes its `model.json` at the start. Training and sampling make their networks here, from the same
description. Sampling itself is `diffusion/sampler.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from nag_jax import storage
from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config, from_section, to_dict
from nag_jax.denoiser import Denoiser, NetworkFunction, NetworkOutput, NetworkTime, Params, from_network
from nag_jax.diffusion.process import ProcessConfig, make_process
from nag_jax.errors import UserError
from nag_jax.models.dit import DiT, ModelConfig, build_model

MODEL_FILE = "model.json"


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """All that is needed to call a network, besides its weights.

    Attributes:
        model: the architecture.
        process: the process that it was trained on.
        num_classes: classes without the null class.
        sample_shape: (H, W, C) of one state.
        network_time: what the network gets for t; see `NetworkFunction`.
        output: what it returns.
        has_null_label: whether it was trained with class dropout.
        has_null_noise: whether it was trained with noise-condition dropout.
    """

    model: ModelConfig
    process: ProcessConfig
    num_classes: int
    sample_shape: tuple[int, ...]
    network_time: NetworkTime = "t"
    output: NetworkOutput = "velocity"
    has_null_label: bool = True
    has_null_noise: bool = True

    def network(self) -> DiT:
        """The Linen module. Raises UserError for sizes that do not fit."""
        height, width, channels = self.sample_shape
        return build_model(self.model, input_shape=(height, width, channels), num_classes=self.num_classes)

    def denoiser(self, params: Params = None) -> Denoiser:
        """The Denoiser with `params`; None for a description to train."""
        function = NetworkFunction(self.network(), self.network_time, self.output, self.model.learn_sigma)
        return from_network(
            function,
            params,
            make_process(self.process),
            num_classes=self.num_classes,
            sample_shape=self.sample_shape,
            has_null_label=self.has_null_label,
            has_null_noise=self.has_null_noise,
        )


def describe(config: Config, *, num_classes: int, sample_shape: tuple[int, ...]) -> ModelDescription:
    """The description of the network that a training run makes.

    The DDPM process asks the network at 1000 t - 1, the number of its step; the others at t.
    """
    return ModelDescription(
        model=config.model,
        process=config.process,
        num_classes=num_classes,
        sample_shape=sample_shape,
        network_time="1000 t - 1" if config.process.name == "ddpm" else "t",
        output=config.objective.prediction,
        has_null_label=config.objective.label_dropout > 0.0,
        has_null_noise=config.objective.noise_dropout > 0.0,
    )


def write_description(folder: epath.PathLike, description: ModelDescription) -> None:
    """Writes `model.json` into `folder`."""
    storage.write_json(epath.Path(folder) / MODEL_FILE, to_dict(description))


def read_description(folder: epath.PathLike) -> ModelDescription:
    """Reads a folder's `model.json`. Raises UserError if there is none or it is damaged."""
    path = epath.Path(folder) / MODEL_FILE
    if not path.exists():
        raise UserError(f"{folder} is no folder of a trained network: it has no {MODEL_FILE}. Give a training folder.")
    return from_section(ModelDescription, storage.read_json(path), str(path))


def load(path: epath.PathLike, weights: str = "ema", step: int | None = None) -> Denoiser:
    """Loads a trained network.

    Args:
        path: a training folder (the `--workdir` of a run).
        weights: "params", or the name of an average.
        step: checkpoint to read; the newest if None.

    Returns:
        The Denoiser with its parameters as host arrays, ready for `nag_jax.sample`.

    Raises:
        UserError: the folder, the checkpoint or the weights are missing or damaged.
    """
    folder = epath.Path(path)
    description = read_description(folder)
    return description.denoiser(read_params(folder, weights, step))


def read_params(folder: epath.PathLike, weights: str, step: int | None = None) -> Any:
    """One set of parameters of a training folder, as host arrays. Raises UserError as `load` does."""
    with Checkpoints(epath.Path(folder) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_params(weights, step)
