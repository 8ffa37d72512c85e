"""Averages of the parameters over training. How many there are and under which names is the caller's choice.

An average is exponential, of a fixed memory, or follows a power function, whose memory grows with training and from
which averages of other lengths can be put together afterwards; see `posthoc_ema.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax

from nag_jax.denoiser import Params
from nag_jax.errors import UserError

Decay = float | Callable[[jax.Array], jax.Array]

LARGEST_SIGMA_REL = 1 / math.sqrt(12)  # of the plain mean of all steps, gamma = 0


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """How fast the average follows.

    Attributes:
        decay: weight of the old average at each step, in [0, 1]; DiT and SiT use 0.9999.
        half_life_examples: if above 0 it is used instead: the number of training examples after which a weight has
            halved, whatever the batch size (Karras et al., arXiv 2206.00364, appendix F.2).
        sigma_rel: if above 0 it is used instead: a power-function average whose weights have this standard deviation,
            in parts of the training so far; at most 0.288 (Karras et al., arXiv 2312.02696, section 3.1).
    """

    decay: float = 0.9999
    half_life_examples: float = 0.0
    sigma_rel: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise UserError(f"ema.decay = {self.decay} is not between 0 and 1.")
        if self.half_life_examples < 0.0:
            raise UserError(f"ema.half_life_examples = {self.half_life_examples} must not be negative.")
        if self.sigma_rel < 0.0:
            raise UserError(f"ema.sigma_rel = {self.sigma_rel} must not be negative.")
        if self.sigma_rel > 0.0:
            power_of(self.sigma_rel)


def decay_per_step(config: EmaConfig, batch_size: int) -> Decay:
    """The decay of one step of `batch_size` examples.

    Returns:
        `decay`, or 0.5^(batch_size / half_life_examples), or for a power function (1 - 1 / s)^(gamma + 1) as a function
        of s, the number of steps with this one (arXiv 2312.02696, section 3.1); the first step's is 0.
    """
    if config.sigma_rel > 0.0:
        gamma = power_of(config.sigma_rel)
        return lambda steps: (1.0 - 1.0 / steps) ** (gamma + 1.0)
    if config.half_life_examples > 0.0:
        return 0.5 ** (batch_size / config.half_life_examples)
    return config.decay


def power_of(sigma_rel: float) -> float:
    """The exponent gamma of the power function whose weights have the standard deviation `sigma_rel`.

    It solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (arXiv 2312.02696, section 3.1).

    Raises:
        UserError: not in (0, 0.288], beyond which gamma would be negative.
    """
    if not 0.0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise UserError(f"sigma_rel = {sigma_rel} is not in (0, {LARGEST_SIGMA_REL:.3f}].")
    low, high = 0.0, 1.0
    while _sigma_rel_of(high) > sigma_rel:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _sigma_rel_of(middle) > sigma_rel else (low, middle)
    return 0.5 * (low + high)


def _sigma_rel_of(gamma: float) -> float:
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def update(ema: Params, params: Params, decay: float | jax.Array) -> Params:
    """decay * ema + (1 - decay) * params, leaf by leaf, written so that equal leaves stay bitwise equal."""
    return jax.tree.map(lambda average, new: average + (1.0 - decay) * (new - average), ema, params)
