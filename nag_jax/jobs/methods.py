"""The guidance methods that a config can name, made from its `sampling` section."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nag_jax.config import SamplingConfig
from nag_jax.diffusion import guidance
from nag_jax.diffusion.corrections import ClassifierNAG, Correction
from nag_jax.diffusion.guidance import Guidance
from nag_jax.errors import UserError


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


def _cfg(config: SamplingConfig) -> Guidance:
    return guidance.cfg(config.cfg_scale, interval=config.cfg_interval, channels=config.guided_channels or None)


def _nag(config: SamplingConfig) -> Guidance:
    return guidance.nag(
        config.nag_scale,
        null=config.nag_null,
        interval=config.nag_interval,
        channels=config.guided_channels or None,
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
    "classifier_nag": lambda config: guidance.plain(),
    "cfg+classifier_nag": _cfg,
}


def make_method(name: str, config: SamplingConfig) -> Method:
    """The method `name` with the scales and intervals of `config`. Raises UserError for an unknown name."""
    if name not in GUIDANCES:
        raise UserError(f"eval.methods names {name!r}, which is not a method. Known: {', '.join(GUIDANCES)}.")
    corrections = (ClassifierNAG(config.nag_scale, config.nag_interval),) if "classifier_nag" in name else ()
    scales = []
    if "cfg" in name or name == "nested":
        scales.append(f"cfg_scale {config.cfg_scale:g}")
    if name not in ("plain", "cfg"):
        scales.append(f"nag_scale {config.nag_scale:g}")
    text = f"{name} ({', '.join(scales)})" if scales else name
    return Method(GUIDANCES[name](config), corrections, text)
