"""One training step as a pure function, and its compiled forms. It draws by position and never talks to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nag_jax.data.latents import sample_states
from nag_jax.denoiser import Denoiser, LatentSpace, Params
from nag_jax.diffusion.objective import Objective, bucket_metrics, check_objective, draw, loss, row_keys
from nag_jax.errors import UserError
from nag_jax.parallel import on_mesh, replicated
from nag_jax.training import ema
from nag_jax.training.state import TrainState

Batch: TypeAlias = Mapping[str, jax.Array]
Metrics: TypeAlias = dict[str, Any]
TrainStep: TypeAlias = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    denoiser: Denoiser,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decays: Mapping[str, ema.Decay],
    *,
    accumulation_steps: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Makes the function of one step.

    Args:
        denoiser: what is trained; its own `params` are not used.
        objective: losses and draws.
        optimizer: from `make_optimizer`.
        ema_decays: decay of each average of the state, by name; one that depends on the steps is a function of them.
        accumulation_steps: micro-batches that run one after the other; the draws do not depend on it.
        axis_name: name of the mapped axis under `pmap`, over which gradients are averaged; None otherwise.

    Returns:
        step(state, batch, run_key) -> (state, metrics), for a batch of "image" [B, ...] (or the "moments" of latents,
        see `batch_states`) and "label" int32 [B] (under `pmap` the device's own part of it) and a typed key that is the
        same at every step. Metrics are "loss", "grad_norm", "param_norm" (scalars) and "buckets", the sums of
        `bucket_metrics`. The loss is that of the parameters before the step, the norm that of those after it; where
        training diverged they are not finite.

    Raises:
        UserError: the objective does not suit the denoiser, or (when called) the batch does not divide.
    """
    check_objective(objective, denoiser)
    denoiser = denoiser.without_params()

    def micro_batch_loss(
        params: Params, batch: Batch, positions: jax.Array, run_key: jax.Array, step: jax.Array, local_size: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        states = batch_states(batch, denoiser.latent, run_key, step, positions)
        draws = draw(objective, denoiser.process, run_key, step, positions, states.shape[1:])
        losses = loss(objective, denoiser, params, {"image": states, "label": batch["label"]}, draws)
        return losses.total.sum() / local_size, bucket_metrics(objective, losses, draws)

    gradient = jax.value_and_grad(micro_batch_loss, has_aux=True)

    def step(state: TrainState, batch: Batch, run_key: jax.Array) -> tuple[TrainState, Metrics]:
        local_size = batch["label"].shape[0]
        if local_size % accumulation_steps:
            raise UserError(
                f"A batch of {local_size} examples does not split into optimizer.accumulation_steps = "
                f"{accumulation_steps} equal parts. Change one of the two."
            )
        offset = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local_size
        rows = {**batch, "position": offset + jnp.arange(local_size)}

        def micro_batch(rows: Batch) -> Any:
            return gradient(state.params, rows, rows["position"], run_key, state.step, local_size)

        if accumulation_steps == 1:
            (total, buckets), gradients = micro_batch(rows)
        else:
            # Micro-batch a takes the rows a, a + A, a + 2A, ...: on a mesh every device keeps its own rows.
            parts = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, accumulation_steps, *x.shape[1:]), 1, 0), rows
            )
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_batch, jax.tree.map(lambda x: x[0], parts))
            )
            ((total, buckets), gradients), _ = jax.lax.scan(
                lambda sums, part: (jax.tree.map(jnp.add, sums, micro_batch(part)), None), zeros, parts
            )
        if axis_name is not None:
            total, gradients = jax.lax.pmean((total, gradients), axis_name)
            buckets = jax.lax.psum(buckets, axis_name)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": total,
            "grad_norm": optax.tree.norm(gradients),
            "param_norm": optax.tree.norm(params),
            "buckets": buckets,
        }
        steps = (state.step + 1).astype(jnp.float32)
        averages = {
            name: ema.update(state.ema[name], params, decay(steps) if callable(decay) else decay)
            for name, decay in ema_decays.items()
        }
        return TrainState(state.step + 1, params, opt_state, averages, state.frozen), metrics

    return step


def batch_states(
    batch: Mapping[str, Any],
    latent: LatentSpace | None,
    run_key: jax.Array,
    step: jax.Array | int,
    positions: jax.Array | None = None,
) -> jax.Array:
    """x_0 of a batch: its images, or latents drawn from its moments.

    Args:
        batch: "image" [B, ...], or "moments" [B, h, w, 2 C] of unscaled latents.
        latent: the latents' space; None for images.
        run_key: typed key of the run.
        step: training step.
        positions: [B], the rows' positions in the global batch; 0 to B - 1 if None.

    Returns:
        float32 [B, ...], images in [-1, 1] or scaled latents.
    """
    if latent is None:
        return jnp.asarray(batch["image"])
    moments = batch["moments"]
    keys = row_keys(run_key, "latent", step, jnp.arange(len(moments)) if positions is None else positions)
    return sample_states(moments, keys, latent.scaling_factor)


def several_steps(step: TrainStep) -> TrainStep:
    """Steps one after the other as one function, which takes a tuple of batches; its metrics have a leading axis."""

    def steps(state: TrainState, batches: Any, run_key: jax.Array) -> tuple[TrainState, Metrics]:
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
        return jax.lax.scan(lambda state, batch: step(state, batch, run_key), state, stacked)

    return steps


def jit_train_step(step: TrainStep, mesh: Mesh, state_shardings: Any, batch_sharding: Any) -> TrainStep:
    """Compiles `step` for a mesh; the state is donated and keeps its shardings, key and metrics are on every device."""
    everywhere = replicated(mesh)
    return jax.jit(
        on_mesh(step, mesh),
        in_shardings=(state_shardings, batch_sharding, everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )


def pmap_train_step(step: TrainStep, axis_name: str) -> TrainStep:
    """Maps `step`, made with the same `axis_name`, over all devices; the state is donated.

    State, key and metrics have no device axis (each device holds all of them, see `parallel.pmap_sharding`), so states
    move freely between the two modes; the batch has one: [local devices, rows of a device, ...].
    """
    return jax.pmap(
        step, axis_name=axis_name, in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=(0,)
    )
