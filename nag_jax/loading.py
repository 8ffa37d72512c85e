"""From a folder, of a training or a conversion, to a Denoiser: `model.json` says what the network is, a checkpoint
holds its weights.

The estimator that was trained on a network is loaded here too, for its shape stands in the same `model.json`.

A training folder writes its `model.json` at the start. Training and sampling make their networks here, from the same
description. Sampling itself is `diffusion/sampler.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config, from_section, to_dict
from nag_jax.denoiser import (
    Denoiser,
    LatentSpace,
    NetworkFunction,
    NetworkOutput,
    NetworkTime,
    Params,
    from_network,
    in_network_time,
    predicted,
)
from nag_jax.diffusion.process import ProcessConfig, make_process
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.hosts import check_shared, is_first, wait_for_all
from nag_jax.models.attention import AUTO, AttentionName, AttentionShape, candidates, obstacle
from nag_jax.models.dit import (
    DiT,
    ModelConfig,
    attention_shape,
    build_model,
    dimensions,
    stack_blocks,
    unstack_blocks,
)
from nag_jax.models.layers import TimeEmbedding, normal_init
from nag_jax.models.noise_estimator import build_estimator
from nag_jax.noise_shift.calibration import Calibration
from nag_jax.noise_shift.estimator import make_estimator
from nag_jax.noise_shift.store import read_estimator
from nag_jax.training.posthoc_ema import Profile, combination, weighted_sum
from nag_jax.training.state import TrainState

MODEL_FILE = "model.json"
NUM_LEVELS_OF_NULL_EMBEDDING = 1000
NULL_NOISE_INITS = ("mean", "normal", "zeros")  # see `initial_null_noise`
NULL_NOISE_SEED = 0
# Weights of this name and a number are put together from stored power-function averages.
AVERAGE_AFTERWARDS = "sigma_rel="
LARGEST_AVERAGE_ERROR = 0.1


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
        null_noise_init: how the null noise embedding was set where no training made it: see `NULL_NOISE_INITS`; "" for
            a network that was initialised here.
        latent: what its states are latents of; None for a network on images.
    """

    model: ModelConfig
    process: ProcessConfig
    num_classes: int
    sample_shape: tuple[int, ...]
    network_time: NetworkTime = "t"
    output: NetworkOutput = "velocity"
    has_null_label: bool = True
    has_null_noise: bool = True
    null_noise_init: str = ""
    latent: LatentSpace | None = None

    def network(self) -> DiT:
        """The Linen module. Raises UserError for sizes that do not fit."""
        height, width, channels = self.sample_shape
        return build_model(self.model, input_shape=(height, width, channels), num_classes=self.num_classes)

    @property
    def attention_shape(self) -> AttentionShape:
        """What the network's attention is asked for; of sizes that `network` accepts."""
        return attention_shape(self.model, self.sample_shape)

    def with_attention(self, name: AttentionName) -> ModelDescription:
        """The same network, its attention computed by `name`."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, attention=name))

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
            latent=self.latent,
        )


def describe(
    config: Config,
    *,
    num_classes: int,
    sample_shape: tuple[int, ...],
    latent: LatentSpace | None = None,
    source: ModelDescription | None = None,
) -> ModelDescription:
    """The description of the network that a training run makes.

    The DDPM process asks the network at 1000 t - 1 (with its 1000 levels, the number of the step), the others at t.

    Args:
        config: the settings of the run.
        num_classes: classes of its data.
        sample_shape: (H, W, C) of one state.
        latent: what the states are latents of.
        source: the network that training starts from, whose own convention (time input, sign of the output) goes on.
    """
    output: NetworkOutput = config.objective.prediction
    network_time: NetworkTime = "1000 t - 1" if config.process.name == "ddpm" else "t"
    if source is not None:
        network_time = source.network_time
        if predicted(source.output) == output:
            output = source.output
    return ModelDescription(
        model=config.model,
        process=config.process,
        num_classes=num_classes,
        sample_shape=sample_shape,
        network_time=network_time,
        output=output,
        has_null_label=config.objective.label_dropout > 0.0,
        has_null_noise=config.objective.noise_dropout > 0.0,
        latent=latent,
    )


def write_description(folder: epath.PathLike, description: ModelDescription) -> None:
    """Writes `model.json` into `folder`."""
    storage.write_json(epath.Path(folder) / MODEL_FILE, to_dict(description))


def read_description(folder: epath.PathLike) -> ModelDescription:
    """Reads a folder's `model.json`. Raises UserError if there is none or it is damaged."""
    path = epath.Path(folder) / MODEL_FILE
    if not path.exists():
        raise UserError(
            f"{folder} is no folder of a trained network: it has no {MODEL_FILE}. Give a training folder, or one that "
            "python -m nag_jax.convert made of public weights."
        )
    return from_section(ModelDescription, storage.read_json(path), str(path))


def write_network(folder: epath.PathLike, description: ModelDescription, params: Params) -> None:
    """Writes a network that was not trained here: `load` finds the same parameters as "ema" and as "params".

    Args:
        folder: to make.
        description: of the network; written last, for a folder without it is not taken for a network.
        params: host arrays.

    Raises:
        NagJaxError: it cannot be written.
    """
    folder = epath.Path(folder)
    if is_first() and (folder / "checkpoints").exists() and not (folder / MODEL_FILE).exists():
        (folder / "checkpoints").rmtree()  # what a killed writing left
    wait_for_all(f"nothing in {folder}")
    step: Any = np.zeros((), np.int32)  # host arrays, which the first process writes
    state = TrainState(
        step=step, params=params, opt_state=(), ema={"ema": params}, frozen={}
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state)
    if is_first():
        write_description(folder, description)
    check_shared(folder / MODEL_FILE)


def load(path: epath.PathLike, weights: str = "ema", step: int | None = None) -> Denoiser:
    """Loads a trained network.

    Args:
        path: a training folder (the `--workdir` of a run) or a converted one.
        weights: "params", the name of an average, or "sigma_rel=NUMBER" for one that is put together of stored
            power-function averages (`training/posthoc_ema.py`).
        step: checkpoint to read; the newest if None.

    Returns:
        The Denoiser with its parameters as host arrays, ready for `nag_jax.sample`. An attention that this machine does
        not have is replaced by what it takes for "auto", see `build_model`.

    Raises:
        UserError: the folder, the checkpoint or the weights are missing or damaged.
    """
    folder = epath.Path(path)
    description, device = read_description(folder), jax.devices()[0]
    name = description.model.attention
    if name != AUTO and obstacle(name, description.attention_shape, device):
        description = description.with_attention(candidates(description.attention_shape, device)[0])
    return description.denoiser(read_params(folder, weights, step))


def load_measuring_estimator(
    path: epath.PathLike, *, checkpoint: epath.PathLike | None = None
) -> tuple[Estimator, Calibration]:
    """Loads the estimator that measures the noise shift of a trained network; `nag_jax.noise_shift.load`.

    Args:
        path: a work folder that holds one in estimator/: of a finished training, or of `--mode=noise_shift`.
        checkpoint: the training folder of the network, where the work folder is another one.

    Returns:
        The estimator with its parameters as host arrays, and its calibration, both for `nag_jax.noise_shift.measure`.

    Raises:
        UserError: there is none, or a file is missing or damaged.
    """
    description = read_description(checkpoint if checkpoint is not None else path)
    params, calibration = read_estimator(epath.Path(path) / "estimator", "measure") or (None, None)
    if calibration is None:
        raise UserError(
            f"{path} holds no estimator that measures the noise shift. Finish its training, or run "
            f"python -m nag_jax.main --mode=noise_shift --checkpoint={checkpoint if checkpoint is not None else path} "
            f"--workdir={path} with the --config of the training."
        )
    return make_estimator(build_estimator(description.network()), params), calibration


def read_params(folder: epath.PathLike, weights: str, step: int | None = None) -> Any:
    """One set of parameters of a training folder, as host arrays. Raises UserError as `load` does."""
    folder = epath.Path(folder)
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        if not weights.startswith(AVERAGE_AFTERWARDS):
            return checkpoints.restore_params(weights, step)
        stored = stored_profiles(folder, checkpoints.steps(), step)
        wanted = Profile(max(profile.step for profile in stored), _number(weights.removeprefix(AVERAGE_AFTERWARDS)))
        factors, error = combination(list(stored), wanted)
        if error > LARGEST_AVERAGE_ERROR:
            raise UserError(
                f"The {len(stored)} stored averages of {folder} make {weights} only to {error:.0%}. Ask for a value "
                "between theirs, or train with more of them (checkpoint.keep_every_steps)."
            )
        averages = (checkpoints.restore_params(name, profile.step) for profile, name in stored.items())
        return weighted_sum(averages, factors.tolist())


def stored_profiles(folder: epath.Path, steps: Sequence[int], last: int | None) -> dict[Profile, str]:
    """The power-function averages in the checkpoints of a training folder, up to step `last`, with their names.

    Raises:
        UserError: there are none.
    """
    averages = storage.read_json(folder / "config.json").get("ema", {}) if (folder / "config.json").exists() else {}
    widths = {name: float(average.get("sigma_rel", 0.0)) for name, average in averages.items()}
    stored = {
        Profile(step, sigma_rel): name
        for step in steps
        for name, sigma_rel in widths.items()
        if sigma_rel > 0.0 and step > 0 and (last is None or step <= last)
    }
    if not stored:
        raise UserError(
            f"{folder} stores no power-function averages, of which others are put together afterwards. Train with two "
            "such as ema.short.sigma_rel = 0.05 and ema.long.sigma_rel = 0.10."
        )
    return stored


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{AVERAGE_AFTERWARDS}{text} is no number. Write {AVERAGE_AFTERWARDS}0.1, say.") from error


def read_for_fine_tuning(folder: epath.PathLike, description: ModelDescription, weights: str, seed: int) -> Params:
    """The parameters that training of `description` starts from.

    Where the source was initialised here and trained without noise-condition dropout, its null noise embedding has
    never been used and gets the "mean" of `initial_null_noise`. A converted network keeps what its conversion chose.
    With another number of classes the rows of the classes are drawn anew, and that of the null class is kept.

    Args:
        folder: a converted or training folder.
        description: the network to be trained.
        weights: "params", or the name of an average.
        seed: of new class embeddings.

    Returns:
        The parameters, as host arrays, in the block layout of `description`.

    Raises:
        UserError: the source is a network of another architecture, process or prediction, or of other latents.
    """
    source = read_description(folder)
    check_fine_tuning(source, description, str(folder))
    params = read_params(epath.Path(folder), weights)
    if description.has_null_noise and not source.has_null_noise and not source.null_noise_init:
        params = {**params, "null_noise_embedding": initial_null_noise(source, params, "mean")}
    if source.num_classes != description.num_classes:
        params = {**params, "y_embedder": _new_classes(params["y_embedder"], description.num_classes, seed)}
    if source.model.scan_blocks != description.model.scan_blocks:
        params = jax.device_get((stack_blocks if description.model.scan_blocks else unstack_blocks)(params))
    return params


def check_fine_tuning(source: ModelDescription, description: ModelDescription, name: str) -> None:
    """Raises UserError unless training of `description` can start from the network `source`, called `name`."""
    for field in ("model", "process", "sample_shape", "network_time", "output"):
        before, now = getattr(source, field), getattr(description, field)
        if field == "model":  # How a network is computed may change, what it computes may not.
            before, now = (dataclasses.asdict(_computed(model)) for model in (before, now))
            differing = [key for key in before if before[key] != now[key]]
            field = ", ".join(f"model.{key}" for key in differing) or field
            before, now = ([model[key] for key in differing] for model in (before, now))
        if before != now:
            raise UserError(
                f"init_from = {name!r} does not fit this config: its {field} is {before}, not {now}. Set the config's "
                "to the network's, or start from another network."
            )
    check_latent(source.latent, description.latent, name)


def check_latent(network: LatentSpace | None, data: LatentSpace | None, name: str) -> None:
    """Raises UserError if a network, called `name`, is asked to work on latents of another space than its own.

    A published network does not say which encoder its latents came from; it takes those of any.
    """
    if (network is None) != (data is None):
        kinds = {True: "images", False: "latents"}
        raise UserError(
            f"The network in {name} works on {kinds[network is None]}, but the data are {kinds[data is None]}. "
            "Set config.data.latents to the folder of its latents, or leave it empty for a network on images."
        )
    if network is None or data is None:
        return
    for field in ("scaling_factor", "downsampling", "encoder_hash"):
        wanted, found = getattr(network, field), getattr(data, field)
        if wanted != found and not (field == "encoder_hash" and not (wanted and found)):
            raise UserError(
                f"The network in {name} works on latents with {field} {wanted}, but these have {found}: they come "
                "from another autoencoder. Encode the data, and decode samples, with the one that it was trained with."
            )


def computed_as(model: ModelConfig, how: ModelConfig) -> ModelConfig:
    """`model` computed as `how` is: dtype, precision, rematerialisation, attention; its parameters stay the same."""
    return dataclasses.replace(
        model, dtype=how.dtype, precision=how.precision, remat=how.remat, attention=how.attention
    )


def _computed(model: ModelConfig) -> ModelConfig:
    """What a network computes: `model` with the named sizes written out, and no word of how."""
    depth, hidden_size, num_heads = dimensions(model)
    return ModelConfig(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=model.patch_size,
        learn_sigma=model.learn_sigma,
    )


def _new_classes(embedder: Params, num_classes: int, seed: int) -> Params:
    """A label embedding of `num_classes` rows drawn as at initialisation, and the null class of `embedder`."""
    null = embedder["embedding"][-1:]
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), num_classes)
    rows = normal_init(key, (num_classes, null.shape[1]), jnp.float32)
    return {"embedding": np.concatenate([np.asarray(rows), null])}


def initial_null_noise(description: ModelDescription, params: Params, init: str) -> np.ndarray:
    """A null noise embedding that no training has made yet; the choices are ours, for the paper does not say.

    Args:
        description: of the network.
        params: its parameters; whatever null noise embedding they hold is not read.
        init: "mean" is the mean output of the time MLP over the training levels, "normal" is drawn from N(0, 0.02^2),
            as the label embedding of a new network is, always with the same seed; "zeros".

    Returns:
        float32 [hidden_size], on the host.

    Raises:
        UserError: an unknown `init`.
    """
    if init not in NULL_NOISE_INITS:
        raise UserError(f"A null noise embedding cannot start as {init!r}. Choose {', '.join(NULL_NOISE_INITS)}.")
    hidden_size = description.network().hidden_size
    if init == "zeros":
        return np.zeros(hidden_size, np.float32)
    if init == "normal":
        return np.float32(0.02) * np.random.default_rng(NULL_NOISE_SEED).standard_normal(hidden_size, np.float32)
    levels = make_process(description.process).levels(NUM_LEVELS_OF_NULL_EMBEDDING)
    return np.asarray(time_embeddings(description, params, jnp.asarray(levels, jnp.float32)).mean(axis=0))


def time_embeddings(description: ModelDescription, params: Params, t: jax.Array) -> jax.Array:
    """The output of the network's time MLP at times `t` [T]: [T, hidden_size]."""
    embedding = TimeEmbedding(description.network().hidden_size)
    embed: Any = embedding.apply({"params": params["t_embedder"]}, in_network_time(description.network_time, t))
    return embed
