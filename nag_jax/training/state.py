"""Everything that a training run carries from one step to the next; it holds no random state and no configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax

from nag_jax.denoiser import Params


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: int32 scalar, number of finished steps.
        params: parameters that are trained.
        opt_state: the optimizer's state.
        ema: averages of the parameters by name.
        frozen: parameters of other networks by name, carried unchanged.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: dict[str, Params]
    frozen: dict[str, Params]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    ema_names: Iterable[str] = ("ema",),
    frozen: Mapping[str, Params] | None = None,
) -> TrainState:
    """The state before the first step; averages start at the parameters, as copies, so that all may be donated."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema={name: jax.tree.map(jnp.copy, params) for name in ema_names},
        frozen=dict(frozen or {}),
    )
