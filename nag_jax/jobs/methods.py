"""The guidance methods that a config can name, and the samplers that run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from nag_jax.config import Config, SamplingConfig
from nag_jax.denoiser import Denoiser
from nag_jax.diffusion import guidance
from nag_jax.diffusion.corrections import ClassifierNAG, Correction
from nag_jax.diffusion.guidance import Guidance
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import make_stepper
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.loading import ModelDescription
from nag_jax.models.noise_estimator import build_estimator
from nag_jax.noise_shift.answers import AnswerObserver
from nag_jax.noise_shift.estimator import make_estimator

ORIGINAL = "original"  # name of the network that fine-tuning started from among a sampler's networks


@dataclasses.dataclass(frozen=True)
class Method:
    """A guidance, with corrections where it is more than a table.

    Attributes:
        guidance: the table.
        corrections: applied to every guided prediction.
        text: the method and its scales, for reports.
    """

    guidance: Guidance
    corrections: tuple[Correction, ...]
    text: str

    @property
    def needs_estimator(self) -> bool:
        """Whether a noise-level estimator takes part in sampling."""
        return bool(self.corrections) or any(branch.noise == "posterior" for branch in self.guidance.branches)

    @property
    def needs_original(self) -> bool:
        """Whether the network that fine-tuning started from takes part in sampling."""
        return any(branch.network == ORIGINAL for branch in self.guidance.branches)


def _cfg(config: SamplingConfig) -> Guidance:
    return guidance.cfg(config.cfg_scale, interval=config.cfg_interval, channels=config.guided_channels or None)


def _nag(config: SamplingConfig) -> Guidance:
    return guidance.nag(
        config.nag_scale,
        null=config.nag_null,
        interval=config.nag_interval,
        channels=config.guided_channels or None,
    )


def _domain(config: SamplingConfig) -> Guidance:
    return guidance.domain(
        config.domain_scale, interval=config.cfg_interval, channels=config.guided_channels or None, network=ORIGINAL
    )


def _on_nag_interval(make: Callable[..., Guidance], config: SamplingConfig, *scales: float) -> Guidance:
    return make(*scales, interval=config.nag_interval, channels=config.guided_channels or None)


GUIDANCES: dict[str, Callable[[SamplingConfig], Guidance]] = {
    "plain": lambda config: guidance.plain(),
    "cfg": _cfg,
    "nag": _nag,
    "cfg+nag": lambda config: _cfg(config) + _nag(config),
    "joint": lambda config: _on_nag_interval(guidance.joint, config, config.nag_scale),
    "class_free": lambda config: _on_nag_interval(guidance.class_free, config, config.nag_scale),
    "nested": lambda config: _on_nag_interval(guidance.nested, config, config.cfg_scale, config.nag_scale),
    "domain": _domain,
    "domain+nag": lambda config: _domain(config) + _nag(config),
    "classifier_nag": lambda config: guidance.plain(),
    "cfg+classifier_nag": _cfg,
}


def make_method(name: str, config: SamplingConfig) -> Method:
    """The method `name` with the scales of `config`.

    CFG and Domain Guidance act on `cfg_interval`, everything else (`nested` too) on `nag_interval`.

    Raises:
        UserError: an unknown name.
    """
    if name not in GUIDANCES:
        raise UserError(f"eval.methods names {name!r}, which is not a method. Known: {', '.join(GUIDANCES)}.")
    corrections = (ClassifierNAG(config.nag_scale, config.nag_interval),) if "classifier_nag" in name else ()
    return Method(GUIDANCES[name](config), corrections, _describe(name, config))


def _describe(name: str, config: SamplingConfig) -> str:
    """The method's name with every setting that is not at its default or has none."""
    settings = []
    if "cfg" in name or name == "nested":
        settings.append(f"cfg_scale {config.cfg_scale:g}")
    if "domain" in name:
        settings.append(f"domain_scale {config.domain_scale:g}")
    if ("cfg" in name or "domain" in name) and config.cfg_interval != (0.0, 1.0):
        settings.append("cfg_interval {:g} to {:g}".format(*config.cfg_interval))
    if name not in ("plain", "cfg", "domain"):
        settings.append(f"nag_scale {config.nag_scale:g}")
        if config.nag_interval != (0.0, 1.0):
            settings.append("nag_interval {:g} to {:g}".format(*config.nag_interval))
    if name in ("nag", "cfg+nag", "domain+nag") and config.nag_null != "network":
        settings.append(f"null from the {config.nag_null}")
    if name not in ("plain", "classifier_nag") and config.guided_channels:
        settings.append(f"first {config.guided_channels} channels")
    return f"{name} ({', '.join(settings)})" if settings else name


def make_samplers(
    config: Config,
    denoiser: Denoiser,
    methods: Mapping[str, Method],
    *,
    measuring: Estimator | None = None,
    guiding: Estimator | None = None,
    original: Denoiser | None = None,
) -> dict[str, Sampler]:
    """The sampler of each method by its name; methods with the same corrections share one, and so one program.

    Args:
        config: stepper, steps and times of observation.
        denoiser: what is sampled.
        methods: by name.
        measuring: asked for the noise level of the states at `noise_shift.times`.
        guiding: for the methods that need an estimator.
        original: the network that fine-tuning started from, for the methods that need it.

    Raises:
        UserError: see `Sampler`.
    """
    samplers: dict[str, Sampler] = {}
    for corrections in dict.fromkeys(method.corrections for method in methods.values()):
        group = {name: method for name, method in methods.items() if method.corrections == corrections}
        needs_estimator = any(method.needs_estimator for method in group.values())
        sampler = Sampler(
            denoiser,
            {name: method.guidance for name, method in group.items()},
            stepper=make_stepper(config.sampling.stepper),
            num_steps=config.sampling.num_steps,
            networks={ORIGINAL: original} if original else None,
            corrections=corrections,
            estimator=guiding if needs_estimator else None,
            observer=AnswerObserver(measuring.posterior) if measuring else None,
            observer_params=measuring.params if measuring else None,
            observe_times=config.noise_shift.times,
        )
        samplers |= dict.fromkeys(group, sampler)
    return samplers


def check_methods(
    config: Config,
    description: ModelDescription,
    methods: Mapping[str, Method],
    original: Denoiser | None = None,
) -> None:
    """Refuses, before anything long runs, what sampling would refuse; `original` needs no parameters.

    Raises:
        UserError: a method needs a null condition that the network is not trained with, the stepper cannot take so many
            steps or needs what the network's prediction does not determine, ...
    """
    unknown = make_estimator(build_estimator(description.network()), None)
    make_samplers(config, description.denoiser(), methods, measuring=unknown, guiding=unknown, original=original)
