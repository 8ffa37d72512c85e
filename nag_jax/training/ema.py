"""Exponential moving averages of the parameters. How many there are and under which names is the caller's choice."""

from __future__ import annotations

import dataclasses

import jax

from nag_jax.denoiser import Params
from nag_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """How fast the average follows.

    Attributes:
        decay: weight of the old average at each step, in [0, 1]; DiT and SiT use 0.9999.
        half_life_examples: if above 0 it is used instead: the number of training examples after which a weight has
            halved, whatever the batch size (Karras et al., arXiv 2206.00364, appendix F.2).
    """

    decay: float = 0.9999
    half_life_examples: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise UserError(f"ema.decay = {self.decay} is not between 0 and 1.")
        if self.half_life_examples < 0.0:
            raise UserError(f"ema.half_life_examples = {self.half_life_examples} must not be negative.")


def decay_per_step(config: EmaConfig, batch_size: int) -> float:
    """The decay of one step of `batch_size` examples: `decay`, or 0.5^(batch_size / half_life_examples)."""
    if config.half_life_examples > 0.0:
        return 0.5 ** (batch_size / config.half_life_examples)
    return config.decay


def update(ema: Params, params: Params, decay: float) -> Params:
    """decay * ema + (1 - decay) * params, leaf by leaf, written so that equal leaves stay bitwise equal."""
    return jax.tree.map(lambda average, new: average + (1.0 - decay) * (new - average), ema, params)
