"""What every job starts from: the config, the folders, the data and the devices, checked before anything long runs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from nag_jax import loading, storage
from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config, to_dict
from nag_jax.data.pipeline import eval_arrays
from nag_jax.data.sources import Source, open_source
from nag_jax.denoiser import Params
from nag_jax.errors import UserError
from nag_jax.jobs.methods import Method, check_methods
from nag_jax.loading import ModelDescription
from nag_jax.models.dit import init_params
from nag_jax.parallel import make_mesh, param_shardings
from nag_jax.params_hash import params_hash

ENVIRONMENT_FILE = "environment.json"


@dataclasses.dataclass
class Experiment:
    """A config with its folders, data and devices.

    Attributes:
        config: the settings.
        workdir: where results are written.
        mesh: the devices.
        train_source, eval_source: training and held-out data.
        description: the network.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    train_source: Source
    eval_source: Source
    description: ModelDescription

    @functools.cached_property
    def train_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Training images in [-1, 1] and labels, at most `eval.num_reference` of them."""
        return eval_arrays(self.train_source, self.config.data, self.config.eval.num_reference)

    @functools.cached_property
    def eval_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Held-out images in [-1, 1] and labels, at most `eval.num_reference` of them."""
        return eval_arrays(self.eval_source, self.config.data, self.config.eval.num_reference)

    def place(self, params: Params) -> Params:
        """Puts parameters on the devices by the mesh's rules."""
        return jax.device_put(params, param_shardings(self.mesh, params))

    def add_to_environment(self, stage: str, **entries: Any) -> None:
        """Puts where a stage ("training", "evaluation") runs, and further entries, into environment.json."""
        self._update_environment({stage: environment()} | entries)

    def add_seconds(self, **stages: float) -> None:
        """Adds to the wall time of stages in environment.json; an interrupted and resumed stage adds up."""
        known = self._environment().get("seconds", {})
        sums = {name: known.get(name, 0.0) + seconds for name, seconds in stages.items()}
        self._update_environment({"seconds": known | sums})

    def _environment(self) -> dict[str, Any]:
        path = self.workdir / ENVIRONMENT_FILE
        return storage.read_json(path) if path.exists() else {}

    def _update_environment(self, entries: dict[str, Any]) -> None:
        storage.write_json(self.workdir / ENVIRONMENT_FILE, self._environment() | entries)


class TrainedNetwork(NamedTuple):
    """A network that is sampled and measured.

    Attributes:
        params: its parameters, on the devices.
        step: their training step.
        fingerprint: their content hash.
        folder: where they were trained.
    """

    params: Params
    step: int
    fingerprint: str
    folder: str


def open_experiment(config: Config, workdir: epath.PathLike, checkpoint: epath.PathLike | None = None) -> Experiment:
    """Opens data and devices for a job.

    Args:
        config: the settings.
        workdir: where results go.
        checkpoint: the folder of a trained network; None for the network that `config` describes.

    Raises:
        UserError: the data, the mesh or the network cannot be had.
    """
    train_source = open_source(config.data, config.data.split)
    eval_source = open_source(config.data, config.data.eval_split)
    if checkpoint is None:
        description = loading.describe(
            config, num_classes=train_source.num_classes, sample_shape=train_source.image_shape
        )
    else:
        description = loading.read_description(checkpoint)
    if description.sample_shape != train_source.image_shape or description.num_classes != train_source.num_classes:
        raise UserError(
            f"The network in {checkpoint} works on states of shape {description.sample_shape} of "
            f"{description.num_classes} classes, but the data are {train_source.fingerprint} of shape "
            f"{train_source.image_shape} with {train_source.num_classes}. Use the config that it was trained with."
        )
    return Experiment(config, epath.Path(workdir), make_mesh(config.parallel), train_source, eval_source, description)


def open_trained(
    config: Config, workdir: epath.Path, checkpoint: epath.Path, methods: Mapping[str, Method]
) -> tuple[Experiment, TrainedNetwork]:
    """Opens a job on a trained network: data and devices, and its newest parameters on them.

    Raises:
        UserError: see `open_experiment` and `check_methods`; there is no checkpoint, or none with the parameters
            `sampling.weights`; or the work folder is that of another training run.
    """
    if workdir != checkpoint and (workdir / "checkpoints").exists():
        raise UserError(
            f"{workdir} holds a training run of its own, so results of {checkpoint} do not belong there. "
            "Choose another --workdir."
        )
    experiment = open_experiment(config, workdir, checkpoint)
    check_methods(config, experiment.description, methods)
    with Checkpoints(checkpoint / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.latest_step()
    params = loading.read_params(checkpoint, config.sampling.weights, step)
    fingerprint = params_hash(params)
    return experiment, TrainedNetwork(experiment.place(params), int(step or 0), fingerprint, str(checkpoint))


def describe_experiment(experiment: Experiment, mode: str, methods: Iterable[str]) -> str:
    """What a job would work on, and the names of the methods that it would sample with, in a few lines."""
    config, description = experiment.config, experiment.description
    shapes = jax.eval_shape(functools.partial(init_params, description.network()), jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    mesh = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    return "\n".join(
        [
            f"mode          {mode}",
            f"work folder   {experiment.workdir}",
            f"devices       {jax.devices()[0].device_kind} x{jax.device_count()} ({mesh})",
            f"training data {experiment.train_source.fingerprint}",
            f"held-out data {experiment.eval_source.fingerprint}",
            f"network       {parameters:,} parameters, states of shape {description.sample_shape}",
            f"training      {config.num_steps} steps of {config.batch_size}",
            f"methods       {', '.join(methods)}; {config.eval.num_samples} samples each",
        ]
    )


def environment() -> dict[str, Any]:
    """Versions, device and commit, to stand beside results."""
    packages = ("nag_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": f"{device.device_kind} x{jax.device_count()}",
        "commit": commit(),
        "command": " ".join(["python -m nag_jax.main", *map(shlex.quote, sys.argv[1:])]),
    }


@functools.cache
def commit() -> str | None:
    """The commit of the source tree that runs, with "+changes" if it differs from it; None outside a git checkout."""
    git = ["git", "-C", str(epath.Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def config_digest(config: Config) -> str:
    """Eight hexadecimal digits that differ between configs."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:8]
