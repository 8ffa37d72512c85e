"""Guidance as a table: which calls of which network are mixed, and with which weights at which times.

A *branch* is one way to call a network. A *guidance* is a base branch plus weighted differences of branches; its table
at a time t maps branches to weights that sum to 1. Guidances add: the sum has both guidances' differences.
This file knows no network and runs nothing: `sampler.py` evaluates the branches of a table. What is no linear mixture
of predictions is a correction (`corrections.py`).

NAG is `nag`: s_w(x|t) = (1 + w) s(x|t) - w s(x) (arXiv 2510.12497). How NAG combines with class guidance is not
published; the sum `cfg(s) + nag(w)`, `joint`, `class_free` and `nested` are the readings offered here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from nag_jax.errors import UserError

MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Branch:
    """One way to call a network.

    Attributes:
        network: "model" for the denoiser that is sampled, or a name in the sampler's `networks`.
        drop_label: ask without the class.
        noise: "kept" asks with the noise level; "null" with the null noise condition (the network must have been
            trained with noise-condition dropout); "posterior" averages the scores s(x|t_k) of noise-conditioned calls
            over p(t_k|x), which needs a time posterior and no retraining.
        time_shift: the network is asked at t + time_shift, clipped to [0, 1].
    """

    network: str = MODEL
    drop_label: bool = False
    noise: Literal["kept", "null", "posterior"] = "kept"
    time_shift: float = 0.0


CONDITIONAL = Branch()
UNCONDITIONAL = Branch(drop_label=True)


def check_weight(weight: float, interval: tuple[float, float]) -> None:
    """Raises UserError unless `weight` is finite and `interval` lies in [0, 1]."""
    lowest, highest = interval
    if not 0.0 <= lowest <= highest <= 1.0:
        raise UserError(f"A guidance interval needs 0 <= lowest <= highest <= 1, got {interval}.")
    if not np.isfinite(weight):
        raise UserError(f"A guidance weight must be finite, got {weight}.")


@dataclasses.dataclass(frozen=True)
class Difference:
    """weight * (towards - away), for times in [lowest, highest] and on the first `channels` channels (all if None)."""

    weight: float
    towards: Branch
    away: Branch
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None

    def __post_init__(self) -> None:
        check_weight(self.weight, self.interval)
        if self.channels is not None and self.channels < 1:
            raise UserError(f"channels = {self.channels}: guide at least one channel, or None for all.")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """A base branch plus weighted differences. Make one with `plain`, `cfg`, `nag` and the others below.

    Attributes:
        base: the branch that the differences are added to; unguided channels and the learned variance are its own.
        differences: what is added.
    """

    base: Branch = CONDITIONAL
    differences: tuple[Difference, ...] = ()

    def __add__(self, other: Guidance) -> Guidance:
        """Both guidances' differences on the shared base. Raises UserError if the bases differ."""
        if self.base != other.base:
            raise UserError(
                f"These guidances start from different branches ({self.base} and {other.base}), so their sum is not "
                "defined. Name one with `.with_base(branch)` on both sides."
            )
        return Guidance(self.base, self.differences + other.differences)

    def with_base(self, base: Branch) -> Guidance:
        """The same differences added to another base branch."""
        return dataclasses.replace(self, base=base)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Every branch that a table of this guidance can hold, the base first, each once."""
        named = [self.base]
        for difference in self.differences:
            named += [difference.towards, difference.away]
        return tuple(dict.fromkeys(named))

    def table(self, t: float, num_channels: int = 1) -> dict[Branch, np.ndarray]:
        """The weights at time `t`.

        Args:
            t: time in [0, 1].
            num_channels: channels of a state.

        Returns:
            Branch to weight per channel [num_channels], float64. Weights sum to 1 on every channel. Branches whose
            weights are all zero are left out, except the base, which stands first.
        """
        weights = {branch: np.zeros(num_channels) for branch in self.branches}
        weights[self.base] += 1.0
        for difference in self.differences:
            if difference.channels is not None and difference.channels > num_channels:
                raise UserError(f"Guidance on {difference.channels} channels, but a state has {num_channels}.")
            lowest, highest = difference.interval
            if lowest <= t <= highest:
                guided = slice(None, difference.channels)
                weights[difference.towards][guided] += difference.weight
                weights[difference.away][guided] -= difference.weight
        return {branch: weight for branch, weight in weights.items() if branch == self.base or weight.any()}

    def tables(self, times: Sequence[float] | np.ndarray, num_channels: int = 1) -> list[dict[Branch, np.ndarray]]:
        """`table` at each of `times`."""
        return [self.table(float(t), num_channels) for t in times]


def plain(*, drop_label: bool = False) -> Guidance:
    """No guidance: one evaluation of the conditional (or, with `drop_label`, the unconditional) network."""
    return Guidance(UNCONDITIONAL if drop_label else CONDITIONAL)


def cfg(
    cfg_scale: float, *, interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None
) -> Guidance:
    """Classifier-free guidance f(null, t) + cfg_scale [f(c, t) - f(null, t)], off at 1 (arXiv 2207.12598).

    Args:
        cfg_scale: the field's scale.
        interval: times at which it acts (arXiv 2404.07724).
        channels: guide only the first so many channels; the public DiT and SiT guide 3 of 4.
    """
    return Guidance(
        differences=(Difference(cfg_scale - 1.0, CONDITIONAL, UNCONDITIONAL, interval, channels),)
    )


def nag(
    nag_scale: float,
    *,
    null: Literal["network", "posterior"] = "network",
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Guidance:
    """Noise Awareness Guidance (1 + nag_scale) f(c, t) - nag_scale f(c), off at 0 (arXiv 2510.12497).

    Args:
        nag_scale: the paper's w.
        null: where f(c) comes from: the network's own null noise condition, or the average of its scores over a time
            posterior. The first averages the network's own target over p(t|x), which is not quite s(x).
        interval: times at which it acts.
        channels: guide only the first so many channels. The paper does not say; all by default.
    """
    away = Branch(noise="null" if null == "network" else "posterior")
    return Guidance(differences=(Difference(nag_scale, CONDITIONAL, away, interval, channels),))


def joint(
    nag_scale: float, *, interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None
) -> Guidance:
    """(1 + nag_scale) f(c, t) - nag_scale f(null, null): class and noise level dropped together, off at 0.

    It contains class guidance, so a result with it is not one "without CFG".
    """
    away = Branch(drop_label=True, noise="null")
    return Guidance(differences=(Difference(nag_scale, CONDITIONAL, away, interval, channels),))


def class_free(
    nag_scale: float, *, interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None
) -> Guidance:
    """f(c, t) + nag_scale [f(null, t) - f(null, null)]: the noise direction of the unconditional network, off at 0."""
    away = Branch(drop_label=True, noise="null")
    return Guidance(differences=(Difference(nag_scale, UNCONDITIONAL, away, interval, channels),))


def nested(
    cfg_scale: float,
    nag_scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Guidance:
    """NAG inside both branches of CFG: s N(c) + (1 - s) N(null) with N(y) = (1 + w) f(y, t) - w f(y, null).

    Args:
        cfg_scale: s, off at 1.
        nag_scale: w, off at 0.
        interval: times at which it acts.
        channels: guide only the first so many channels.
    """
    conditional_null = Branch(noise="null")
    unconditional_null = Branch(drop_label=True, noise="null")
    return Guidance(
        differences=(
            Difference(cfg_scale - 1.0, CONDITIONAL, UNCONDITIONAL, interval, channels),
            Difference(cfg_scale * nag_scale, CONDITIONAL, conditional_null, interval, channels),
            Difference((1.0 - cfg_scale) * nag_scale, UNCONDITIONAL, unconditional_null, interval, channels),
        )
    )


def autoguidance(
    scale: float,
    *,
    network: str = "weak",
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Guidance:
    """f(c, t) + (scale - 1) [f(c, t) - f_weak(c, t)], off at 1 (arXiv 2406.02507).

    Args:
        scale: the paper's w.
        network: the weaker network's name in the sampler's `networks`.
        interval: times at which it acts.
        channels: guide only the first so many channels.
    """
    return Guidance(
        differences=(Difference(scale - 1.0, CONDITIONAL, Branch(network=network), interval, channels),)
    )


def domain(
    scale: float,
    *,
    network: str = "original",
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Guidance:
    """Domain Guidance f_original(null, t) + scale [f(c, t) - f_original(null, t)], off at 1 (Zhong et al., ICLR 2025).

    Args:
        scale: the paper's s (1.5 there).
        network: the original pre-trained network's name in the sampler's `networks`.
        interval: times at which it acts.
        channels: guide only the first so many channels.
    """
    original = Branch(network=network, drop_label=True)
    return Guidance(differences=(Difference(scale - 1.0, CONDITIONAL, original, interval, channels),))


def self_guidance(
    scale: float,
    time_shift: float = 0.01,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Guidance:
    """f(c, t) + scale [f(c, t) - f(c, t + time_shift)], off at 0, training-free (arXiv 2412.05827).

    Args:
        scale: the paper's w (3 there for SD3).
        time_shift: on our time axis; .01 is 10 DDPM steps. Clipped so that t + time_shift <= 1.
        interval: times at which it acts.
        channels: guide only the first so many channels.
    """
    return Guidance(
        differences=(Difference(scale, CONDITIONAL, Branch(time_shift=time_shift), interval, channels),)
    )
