"""AdamW with warm-up, a schedule, clipping and a choice of what is trained; all of it is optax."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import optax

from nag_jax.denoiser import Params
from nag_jax.errors import UserError

NULL_NOISE_EMBEDDING = "null_noise_embedding"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated; the defaults are those of the public DiT and SiT.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: steps over which the rate rises linearly from 0; 0 for none.
        schedule: "constant", or "cosine" (down to 0 at the last step).
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of Adam's second moment.
        weight_decay: decoupled weight decay, on every trained parameter.
        clip_norm: largest global norm of the gradient of the trained parameters; 0 is off.
        accumulation_steps: micro-batches that a batch is split into.
        trainable: "all", or "null_noise_embedding" (everything else keeps its value).
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    accumulation_steps: int = 1
    trainable: Literal["all", "null_noise_embedding"] = "all"

    def __post_init__(self) -> None:
        for key, known in (("schedule", ("constant", "cosine")), ("trainable", ("all", NULL_NOISE_EMBEDDING))):
            if getattr(self, key) not in known:
                raise UserError(f"optimizer.{key} = {getattr(self, key)!r} is not one of {', '.join(known)}.")
        for key in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, key) < 0:
                raise UserError(f"optimizer.{key} = {getattr(self, key)} must not be negative.")
        if self.accumulation_steps < 1:
            raise UserError(f"optimizer.accumulation_steps = {self.accumulation_steps} must be at least 1.")


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
        config: the optimizer's settings.
        num_steps: steps of the whole run, where the cosine ends.

    Returns:
        A function of the step that also runs in compiled code.

    Raises:
        UserError: a cosine that would end before its warm-up does.
    """
    if config.schedule == "cosine":
        if config.warmup_steps >= num_steps:
            raise UserError(
                f"optimizer.warmup_steps = {config.warmup_steps} leaves none of the {num_steps} steps to the cosine "
                "schedule. Lower it, or use optimizer.schedule = 'constant'."
            )
        main = optax.cosine_decay_schedule(config.learning_rate, num_steps - config.warmup_steps)
    else:
        main = optax.constant_schedule(config.learning_rate)
    if config.warmup_steps == 0:
        return main
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Makes the optimizer. Gradient accumulation is the training step's affair.

    Args:
        config: the settings.
        num_steps: steps of the whole run.

    Returns:
        Clipping (if any), then AdamW, on the trained parameters; the updates of all others are zero, and they have no
        optimizer state.
    """
    adamw = optax.adamw(
        learning_rate(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    optimizer = optax.chain(clip, adamw)
    if config.trainable == "all":
        return optimizer
    return optax.multi_transform({"trained": optimizer, "fixed": optax.set_to_zero()}, _null_noise_labels)


def _null_noise_labels(params: Params) -> Params:
    def label(path: tuple, leaf: jax.Array) -> str:
        return "trained" if NULL_NOISE_EMBEDDING in jax.tree_util.keystr(path) else "fixed"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "trained" not in jax.tree.leaves(labels):
        raise UserError(
            "optimizer.trainable = 'null_noise_embedding', but the network has no such parameter. Use 'all'."
        )
    return labels
