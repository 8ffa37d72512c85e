"""What every job starts from: the config, the folders, the data and the devices, checked before anything long runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from nag_jax import loading, storage
from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config, to_dict
from nag_jax.data.images import to_float
from nag_jax.data.latents import LatentSource, open_latents
from nag_jax.data.pipeline import eval_arrays
from nag_jax.data.sources import DataConfig, Source, open_source
from nag_jax.denoiser import Params
from nag_jax.errors import UserError
from nag_jax.hosts import is_first
from nag_jax.jobs.decoding import Decoder
from nag_jax.jobs.methods import Method, check_methods
from nag_jax.loading import ModelDescription
from nag_jax.models.attention import AUTO, check_attention
from nag_jax.models.dit import init_params
from nag_jax.parallel import make_mesh, param_shardings, place
from nag_jax.params_hash import params_hash

ENVIRONMENT_FILE = "environment.json"
# The variables that XLA, its TPU part and its memory pool on GPUs are steered by; launch/flags.sh sets the first two.
COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
ORIGINAL_FOLDER = "original"  # of the network that fine-tuning started from, in the work folder


@dataclasses.dataclass
class Experiment:
    """A config with its folders, data and devices. Data are opened when they are first asked for.

    Attributes:
        config: the settings.
        workdir: where results are written.
        mesh: the devices.
        description: the network; its attention may be "auto", see `attention_choice.settled`.
        network_folder: where the network is, or is trained.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    description: ModelDescription
    network_folder: epath.Path

    @functools.cached_property
    def train_source(self) -> Source | LatentSource:
        """Training data. Raises UserError if they cannot be opened or are not what the network works on."""
        return self._open(self.config.data.split)

    @functools.cached_property
    def eval_source(self) -> Source | LatentSource:
        """Held-out data. Raises UserError as `train_source` does."""
        return self._open(self.config.data.eval_split)

    @functools.cached_property
    def train_states(self) -> tuple[np.ndarray, np.ndarray]:
        """x_0 of training data (images in [-1, 1] or scaled latents) and labels, at most `eval.num_reference`."""
        return eval_arrays(self.train_source, self.config.data, self.config.eval.num_reference)

    @functools.cached_property
    def eval_states(self) -> tuple[np.ndarray, np.ndarray]:
        """x_0 of held-out data and labels, at most `eval.num_reference` of them."""
        return eval_arrays(self.eval_source, self.config.data, self.config.eval.num_reference)

    @functools.cached_property
    def train_images(self) -> np.ndarray:
        """The images of `train_states` in [-1, 1], latents decoded."""
        return to_float(self.decoder.decode_all(self.train_states[0]))

    @functools.cached_property
    def eval_images(self) -> np.ndarray:
        """The images of `eval_states` in [-1, 1], latents decoded."""
        return to_float(self.decoder.decode_all(self.eval_states[0]))

    @functools.cached_property
    def decoder(self) -> Decoder:
        """From states to images. Raises UserError if there is no autoencoder for latents."""
        return Decoder(self.config.data, self.description.latent, self.mesh, str(self.network_folder))

    @functools.cached_property
    def original_params(self) -> Params:
        """Parameters of the network that training started from, on the devices, for Domain Guidance.

        Raises:
            UserError: the network was not fine-tuned.
        """
        return self.place(loading.read_params(self._original_folder(), "ema"))

    def original_description(self, how: ModelDescription) -> ModelDescription:
        """What the network is that training started from, computed as `how`; see `original_params`."""
        original = loading.read_description(self._original_folder())
        return dataclasses.replace(original, model=loading.computed_as(original.model, how.model))

    def _original_folder(self) -> epath.Path:
        folder = original_folder(self.config, self.network_folder)
        if folder is None:
            raise UserError(
                "Domain Guidance needs the network that fine-tuning started from, and "
                f"{self.network_folder} keeps none in {ORIGINAL_FOLDER}/. Leave the domain methods out of "
                "config.eval.methods, or set config.init_from and train."
            )
        return folder

    def _open(self, split: str) -> Source | LatentSource:
        source = open_data(self.config.data, split)
        description = self.description
        if description.sample_shape != source.image_shape or description.num_classes != source.num_classes:
            raise UserError(
                f"The network in {self.network_folder} works on states of shape {description.sample_shape} of "
                f"{description.num_classes} classes, but the data are {source.fingerprint} of shape "
                f"{source.image_shape} with {source.num_classes}. Use the config that it was trained with."
            )
        loading.check_latent(description.latent, source.latent, str(self.network_folder))
        return source

    def place(self, params: Params) -> Params:
        """Puts parameters on the devices by the mesh's rules."""
        return place(params, param_shardings(self.mesh, params))

    def add_to_environment(self, stage: str, **entries: Any) -> None:
        """Puts where a stage ("training", "evaluation") runs, and further entries, into environment.json."""
        self.update_environment({stage: environment()} | entries)

    def add_seconds(self, **stages: float) -> None:
        """Adds to the wall time of stages in environment.json; an interrupted and resumed stage adds up.

        On several hosts the first one's count.
        """
        known = self.recorded_environment().get("seconds", {})
        sums = {name: known.get(name, 0.0) + seconds for name, seconds in stages.items()}
        self.update_environment({"seconds": known | sums})

    def recorded_environment(self) -> dict[str, Any]:
        """What environment.json holds by now."""
        path = self.workdir / ENVIRONMENT_FILE
        return storage.read_json(path) if path.exists() else {}

    def update_environment(self, entries: dict[str, Any]) -> None:
        """Puts entries into environment.json, on the first host."""
        if is_first():
            storage.write_json(self.workdir / ENVIRONMENT_FILE, self.recorded_environment() | entries)


class TrainedNetwork(NamedTuple):
    """A network that is sampled and measured.

    Attributes:
        params: its parameters, on the devices.
        step: their training step; 0 for a converted network.
        fingerprint: their content hash.
    """

    params: Params
    step: int
    fingerprint: str


def open_training(config: Config, workdir: epath.PathLike) -> Experiment:
    """Opens data and devices for a training run in `workdir`, and says what network it makes.

    Raises:
        UserError: the data, the mesh or the network cannot be had, the network does not start from `init_from`, or
            the folder is that of another network.
    """
    workdir = epath.Path(workdir)
    source = open_data(config.data, config.data.split)
    folder = original_folder(config, workdir)
    original = loading.read_description(folder) if folder is not None else None
    description = loading.describe(
        config,
        num_classes=source.num_classes,
        sample_shape=source.image_shape,
        latent=source.latent,
        source=original,
    )
    if original is not None:
        loading.check_fine_tuning(original, description, config.init_from)
        if original.num_classes != description.num_classes and config.optimizer.trainable != "all":
            raise UserError(
                f"{config.init_from} has {original.num_classes} classes and the data have {description.num_classes}: "
                f"the new class embeddings need training, but optimizer.trainable = {config.optimizer.trainable!r}. "
                "Set it to 'all', or start from a network of these classes, such as the control's."
            )
    mesh = make_mesh(config.parallel)
    check_network(description, mesh)
    return Experiment(config, workdir, mesh, description, workdir)


def check_network(description: ModelDescription, mesh: Mesh) -> None:
    """Raises UserError for sizes that do not fit, or an attention that the devices do not have."""
    description.network()
    if description.model.attention != AUTO:
        check_attention(description.model.attention, description.attention_shape, mesh.devices.flat[0])


def original_folder(config: Config, network_folder: epath.Path) -> epath.Path | None:
    """Where the network is that training started from: kept in the work folder, at first in `init_from`, or nowhere."""
    kept = network_folder / ORIGINAL_FOLDER
    if (kept / loading.MODEL_FILE).exists():
        return kept
    return epath.Path(config.init_from) if config.init_from else None


def open_experiment(config: Config, workdir: epath.PathLike, checkpoint: epath.PathLike) -> Experiment:
    """Opens devices for a job on the network in the folder `checkpoint`, computed as `config.model` says.

    Raises:
        UserError: the mesh or the network cannot be had.
    """
    description = loading.read_description(checkpoint)
    description = dataclasses.replace(description, model=loading.computed_as(description.model, config.model))
    mesh = make_mesh(config.parallel)
    check_network(description, mesh)
    return Experiment(config, epath.Path(workdir), mesh, description, epath.Path(checkpoint))


def open_trained(
    config: Config, workdir: epath.Path, checkpoint: epath.Path, methods: Mapping[str, Method], *, needs_data: bool
) -> tuple[Experiment, TrainedNetwork]:
    """Opens a job that samples a trained network: devices, data, and its newest parameters.

    Args:
        config: the settings.
        workdir: where results go.
        checkpoint: the folder of the network.
        methods: what is sampled with.
        needs_data: whether the job looks at training and held-out data whatever the methods are.

    Raises:
        UserError: see `open_experiment` and `check_methods`; the data do not belong to the network; there is no
            checkpoint, or none with the parameters `sampling.weights`; or the work folder is that of another training
            run.
    """
    if workdir != checkpoint and (workdir / "checkpoints").exists():
        raise UserError(
            f"{workdir} holds a training run of its own, so results of {checkpoint} do not belong there. "
            "Choose another --workdir."
        )
    experiment = open_experiment(config, workdir, checkpoint)
    check_sampling(experiment, methods, needs_data=needs_data)
    with Checkpoints(checkpoint / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.latest_step()
    params = loading.read_params(checkpoint, config.sampling.weights, step)
    fingerprint = params_hash(params)
    return experiment, TrainedNetwork(experiment.place(params), int(step or 0), fingerprint)


def check_sampling(experiment: Experiment, methods: Mapping[str, Method], *, needs_data: bool) -> None:
    """Refuses, before anything long runs, what a job that samples would refuse.

    Args:
        experiment: config and devices.
        methods: what is sampled with.
        needs_data: see `open_trained`.

    Raises:
        UserError: see `check_methods`; data that are needed cannot be opened or do not belong to the network, there is
            no autoencoder to decode with, or no original network.
    """
    for source in data_in_use(experiment.config, methods, needs_data=needs_data):
        getattr(experiment, source)
    original = None
    if any(method.needs_original for method in methods.values()):
        original = experiment.original_description(experiment.description).denoiser()
    check_methods(experiment.config, experiment.description, methods, original)
    _ = experiment.decoder


def data_in_use(config: Config, methods: Mapping[str, Method], *, needs_data: bool) -> tuple[str, ...]:
    """The names of an Experiment's data that a job that samples reads; arguments as in `check_sampling`."""
    if needs_data or any(method.needs_estimator for method in methods.values()):
        return "train_source", "eval_source"
    return ("eval_source",) if config.sampling.label_rule == "reference" else ()


def open_data(config: DataConfig, split: str) -> Source | LatentSource:
    """Latents where the config names a folder of them, otherwise images. Raises UserError if there are none."""
    return open_latents(config, split) if config.latents else open_source(config, split)


def describe_experiment(experiment: Experiment, mode: str, methods: Mapping[str, Method], *, needs_data: bool) -> str:
    """What a job would work on, and the names of the methods that it would sample with, in a few lines."""
    config, description = experiment.config, experiment.description
    shapes = jax.eval_shape(functools.partial(init_params, description.network()), jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    mesh = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    lines = [
        f"mode          {mode}",
        f"work folder   {experiment.workdir}",
        f"devices       {jax.devices()[0].device_kind} x{jax.device_count()} ({mesh}), "
        f"{jax.process_count()} process(es)",
        f"network       {parameters:,} parameters, states of shape {description.sample_shape}",
    ]
    in_use = data_in_use(config, methods, needs_data=needs_data)
    if "train_source" in in_use:
        lines.append(f"training data {experiment.train_source.fingerprint}")
    if "eval_source" in in_use:
        lines.append(f"held-out data {experiment.eval_source.fingerprint}")
    if mode == "train":
        start = f" from {config.init_from}" if config.init_from else ""
        lines.append(f"training      {config.num_steps} steps of {config.batch_size}{start}")
    else:
        lines.append(f"checkpoint    {experiment.network_folder}")
    lines.append(f"methods       {', '.join(methods) or 'none'}; {config.eval.num_samples} samples each")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Versions, device, compiler flags and commit, to stand beside results."""
    packages = ("nag_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": f"{device.device_kind} x{jax.device_count()}",
        "processes": jax.process_count(),
        "compiler_flags": compiler_flags(),
        "commit": commit(),
        "command": " ".join(["python -m nag_jax.main", *map(shlex.quote, sys.argv[1:])]),
    }


def compiler_flags() -> dict[str, str]:
    """The variables of `COMPILER_FLAGS` that are set."""
    return {name: os.environ[name] for name in COMPILER_FLAGS if os.environ.get(name)}


def version(package: str) -> str | None:
    """The version of an installed package; None for one that is imported from where its source lies."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """The commit of the source tree that runs, with "+changes" if it differs from it; None outside a git checkout.

    What lies in results/ is no source: a benchmark that writes there does not change what it measures next.
    """
    git = ["git", "-C", str(epath.Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)results"]
        changes = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def config_digest(config: Config) -> str:
    """Eight hexadecimal digits that differ between configs."""
    return storage.digest(to_dict(config))
