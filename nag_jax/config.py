"""The configuration of a run: all sections together, their defaults, and the road from a config file to them.

Each section is the dataclass of the code that reads it, so a default stands in one place. A config file starts from
`defaults()` and sets what its run fixes; unknown keys are refused with the nearest known name. No section's meaning is
decided here.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import ml_collections

from nag_jax.checkpoint import CheckpointConfig
from nag_jax.data.sources import DataConfig
from nag_jax.diffusion.objective import Objective
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.errors import UserError
from nag_jax.models.dit import ModelConfig
from nag_jax.models.feature_classifier import FeatureClassifierConfig
from nag_jax.noise_shift.estimator import EstimatorConfig
from nag_jax.parallel import ParallelConfig
from nag_jax.training.ema import EmaConfig
from nag_jax.training.optimizer import OptimizerConfig

# Keys that decide what a training run computes: a work folder goes on only under the same ones.
FIXED_ON_RESUME = ("model", "process", "objective", "data", "optimizer", "batch_size", "ema", "seed", "init_from")
# Within them, what says only where the same things lie, or how the same step is computed: that changes rounding alone.
# Neither dtype nor precision is among these: in bfloat16 it is another step.
FREE_ON_RESUME = (
    "data.data_dir",
    "data.vae",
    "data.latents",
    "model.remat",
    "model.attention",
    "optimizer.accumulation_steps",
)

Section = TypeVar("Section")


def _check_at_least(section: str, values: Any, **least: int) -> None:
    """Raises UserError if a key of `values` is below the value given for it."""
    for name, smallest in least.items():
        if getattr(values, name) < smallest:
            raise UserError(f"{section}.{name} = {getattr(values, name)} must be at least {smallest}.")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often a run says something.

    Attributes:
        every_steps: training steps between two lines of metrics.jsonl.
        profile_steps: (first, last) training step of a profiler trace in profile/; none by default. Steps that run
            together (`parallel.steps_per_dispatch`) are traced together.
    """

    every_steps: int = 50
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_at_least("log", self, every_steps=1)
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise UserError(f"log.profile_steps = {steps} must be (first, last), such as (10, 14), or nothing.")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn.

    Attributes:
        stepper: "euler", "heun", "euler_maruyama", "ddim", "ddpm", "ddpm_learned" or "dpm_solver_pp_2m".
        num_steps: steps of the stepper.
        batch_size: samples drawn at once, over all devices.
        weights: "params", the name of an average in `ema`, or "sigma_rel=NUMBER", see `loading.load`.
        cfg_scale: classifier-free guidance, off at 1.
        domain_scale: Domain Guidance of a fine-tuned network, off at 1.
        cfg_interval: times (lowest, highest) at which these two act.
        nag_scale: Noise Awareness Guidance, the paper's w, off at 0.
        nag_interval: times at which it acts.
        nag_null: the null branch of NAG: "network" or "posterior".
        guided_channels: guide only the first so many channels; 0 for all.
        label_rule: labels of the samples: "balanced", "random", or "reference" (those of the held-out images, in their
            order and over again).
    """

    stepper: str = "euler"
    num_steps: int = 50
    batch_size: int = 256
    weights: str = "ema"
    cfg_scale: float = 1.5
    domain_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    nag_scale: float = 1.0
    nag_interval: tuple[float, float] = (0.0, 1.0)
    nag_null: Literal["network", "posterior"] = "network"
    guided_channels: int = 0
    label_rule: Literal["balanced", "random", "reference"] = "balanced"

    def __post_init__(self) -> None:
        _check_at_least("sampling", self, num_steps=1, batch_size=1, guided_channels=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated.

    Attributes:
        name: name of the evaluation's folder; "" for a readable digest of its conditions.
        methods: what is compared on the same noise and labels; see `jobs/methods.py` for the names.
        num_samples: samples for each method.
        seed: seed of the samples' noise and labels.
        every_steps: evaluate during training every so many steps; 0 for the end alone.
        num_reference: most training and held-out images that are read for features and the noise shift.
        num_resamples: bootstrap resamples behind every interval.
        save_samples: also write the samples, an .npz of ADM's layout for each method.
        feature_net: folder of a converted feature net (FID's Inception, EfficientNet-Lite0), for the distances; "" for
            a classifier that is trained on the training data, and is of no use for `--samples`.
        reference: what distances are measured to: an .npz of statistics such as ADM's, or images (.npz or a folder); ""
            for held-out images, at most num_reference.
        inception_score_order: of the images that are split in ten: "shuffled", or "as_given" as ADM's evaluator does.
    """

    name: str = ""
    methods: tuple[str, ...] = ("plain", "cfg", "nag", "cfg+nag")
    num_samples: int = 1000
    seed: int = 0
    every_steps: int = 0
    num_reference: int = 2000
    num_resamples: int = 200
    save_samples: bool = False
    feature_net: str = ""
    reference: str = ""
    inception_score_order: Literal["shuffled", "as_given"] = "shuffled"

    def __post_init__(self) -> None:
        _check_at_least("eval", self, num_samples=2, seed=0, every_steps=0, num_reference=2, num_resamples=20)


@dataclasses.dataclass(frozen=True)
class NoiseShiftConfig:
    """How the noise shift is measured.

    Attributes:
        times: times at which states are judged; the nearest step of the sampler counts. Without any, an evaluation
            leaves the noise shift out.
        num_forward: held-out states per time that the sampled ones are compared with.
    """

    times: tuple[float, ...] = (0.95, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.05)
    num_forward: int = 1000

    def __post_init__(self) -> None:
        _check_at_least("noise_shift", self, num_forward=2)
        if not all(0.0 < t <= 1.0 for t in self.times):
            raise UserError(f"noise_shift.times = {self.times} must be times in (0, 1].")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The grid of guidance weights that `--mode=compare` samples with, every pair of the two lists.

    Attributes:
        cfg_scales: scales of classifier-free guidance, off at 1.
        nag_scales: scales of Noise Awareness Guidance, the paper's w, off at 0.
    """

    cfg_scales: tuple[float, ...] = (1.0, 1.5)
    nag_scales: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        seed: seed of initialisation, data order and training draws.
        batch_size: examples of a training step, over all devices and hosts.
        num_steps: training steps.
        init_from: a training or converted folder whose parameters (those that `sampling.weights` names) training
            starts from; the work folder keeps them in original/. "" starts afresh.
        model, process, objective, data, optimizer, checkpoint, parallel, log: see their classes.
        ema: averages of the parameters by name.
        sampling, eval, noise_shift, compare: see their classes.
        estimator: training of the noise-level estimator.
        features: training of the classifier whose features the Fréchet distance uses.
    """

    seed: int = 0
    batch_size: int = 256
    num_steps: int = 1000
    init_from: str = ""
    model: ModelConfig = ModelConfig()
    process: ProcessConfig = ProcessConfig()
    objective: Objective = Objective()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Mapping[str, EmaConfig] = dataclasses.field(default_factory=lambda: {"ema": EmaConfig()})
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    sampling: SamplingConfig = SamplingConfig()
    eval: EvalConfig = EvalConfig()
    noise_shift: NoiseShiftConfig = NoiseShiftConfig()
    compare: CompareConfig = CompareConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    features: FeatureClassifierConfig = FeatureClassifierConfig()

    def __post_init__(self) -> None:
        _check_at_least("config", self, seed=0, batch_size=1, num_steps=1)
        together = self.parallel.steps_per_dispatch
        steps = {
            "num_steps": self.num_steps,
            "log.every_steps": self.log.every_steps,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "eval.every_steps": self.eval.every_steps,
        }
        uneven = [f"{key} = {value}" for key, value in steps.items() if value % together]
        if uneven:
            raise UserError(
                f"parallel.steps_per_dispatch = {together} steps run together, so {' and '.join(uneven)} must be a "
                "multiple of it. Change one of them."
            )
        if self.optimizer.trainable != "all" and self.objective.noise_dropout == 0.0:
            raise UserError(
                f"optimizer.trainable = {self.optimizer.trainable!r} trains what is used only where the noise "
                "condition is dropped, and objective.noise_dropout is 0. Set it above 0."
            )


def defaults() -> ml_collections.ConfigDict:
    """Every key with its default, as a ConfigDict for a config file to change. Keys that do not exist are refused."""
    config = ml_collections.ConfigDict(to_dict(Config()))
    config.ema.unlock()
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A config (or a section) as nested dicts of plain values; tuples stay tuples."""
    return dataclasses.asdict(config)


def from_config_dict(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Reads a ConfigDict, or the dict of a stored config.json, into a `Config`.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type, or a value that its section
            refuses.
    """
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return from_section(Config, values, "config")


def from_section(section: type[Section], values: Mapping[str, Any], path: str) -> Section:
    """Builds a dataclass of settings from nested plain values.

    Args:
        section: the dataclass.
        values: its fields by name; those left out keep their defaults.
        path: what error messages call it.

    Raises:
        UserError: see `from_config_dict`.
    """
    hints = typing.get_type_hints(section)
    for name in values:
        if name not in hints:
            raise UserError(unknown_key(f"{path}.{name}", [f"{path}.{key}" for key in hints]))
    built = {name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    return section(**built)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is a section of keys, not {value!r}.")
        return from_section(typing.cast(type, hint), value, path)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        inner = typing.get_args(hint)[1]
        return {name: _convert(inner, item, f"{path}.{name}") for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path} = {value!r} must be a list such as (0.0, 1.0).")
        items = typing.get_args(hint)
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise UserError(f"{path} = {value!r} must have {len(items)} values.")
        return tuple(_convert(items[0], item, path) for item in value)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            known = ", ".join(repr(known) for known in typing.get_args(hint))
            raise UserError(f"{path} = {value!r} is not one of {known}.")
        return value
    if origin is types.UnionType:
        if value is None and type(None) in typing.get_args(hint):
            return None
        first = next(item for item in typing.get_args(hint) if item is not type(None))
        return _convert(first, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{path} = {value!r} must be of type {hint.__name__}.")
    return value


def unknown_key(key: str, known: list[str]) -> str:
    """The message for an unknown key "config.a.b": the nearest known keys by their last name, or all of the section."""
    section, _, name = key.rpartition(".")
    names: dict[str, list[str]] = {}
    for candidate in known:
        names.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    nearest = [path for match in difflib.get_close_matches(name, names, n=3) for path in names[match]]
    if nearest:
        return f"{key} is not a key of this config. Nearest: {', '.join(nearest)}."
    in_section = [candidate for candidate in known if candidate.rpartition(".")[0] == section] or known
    return f"{key} is not a key of this config. Known: {', '.join(in_section)}."


def key_paths(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested dict as ("a.b.c", value)."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from key_paths(value, f"{path}.")
        else:
            yield path, value


def with_training_of(config: Config, stored: Config) -> Config:
    """`config` with everything about training as in `stored`: what a job on a trained network works under.

    Its attention is that of `config`: the job may run on another kind of device.
    """
    kept = {name: getattr(stored, name) for name in ("num_steps", *FIXED_ON_RESUME) if name != "data"}
    kept["model"] = dataclasses.replace(stored.model, attention=config.model.attention)
    return dataclasses.replace(config, **kept)


def choose_options(options: str, known: Sequence[str], exclusive: Sequence[Sequence[str]] = ()) -> tuple[str, ...]:
    """Reads the option string of a config file, "a,b" in configs/NAME.py:a,b.

    Args:
        options: names with commas between them; "" for none.
        known: names that the file understands.
        exclusive: groups of names of which at most one may be given.

    Returns:
        The names that were given.

    Raises:
        UserError: an unknown name (with the nearest known one), or two of a group.
    """
    chosen = tuple(option for option in options.split(",") if option)
    for option in chosen:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=3) or known
            raise UserError(f"{option!r} is not an option of this config. Nearest: {', '.join(nearest)}.")
    for group in exclusive:
        both = [option for option in chosen if option in group]
        if len(both) > 1:
            raise UserError(f"The options {' and '.join(both)} exclude each other. Give one.")
    return chosen


def check_resume(stored: Config, current: Config) -> None:
    """Raises UserError if a work folder written under `stored` cannot go on under `current`, naming the keys.

    The keys in FIXED_ON_RESUME must be equal, but for those in FREE_ON_RESUME. `num_steps` may grow under a constant
    schedule.
    """
    before, now = dict(key_paths(to_dict(stored))), dict(key_paths(to_dict(current)))
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] in FIXED_ON_RESUME and key not in FREE_ON_RESUME and before.get(key) != now.get(key)
    ]
    if current.num_steps < stored.num_steps:
        differing.append(f"num_steps was {stored.num_steps}, is {current.num_steps} (it may only grow)")
    elif stored.num_steps != current.num_steps and current.optimizer.schedule != "constant":
        differing.append(
            f"num_steps was {stored.num_steps}, is {current.num_steps} (it may grow under a constant schedule only)"
        )
    if differing:
        raise UserError(
            "The work folder holds a run of another configuration: "
            + "; ".join(differing)
            + ". Choose another --workdir, or set these keys back."
        )
