"""The sampler: one `lax.scan` over network evaluations, for any denoiser, stepper and guidance.

Rows are prepared on the host: the stepper's coefficients, and for every row which calls of which network it makes (the
guidance's table at that time). All calls of a row to one network run as one batch, and `lax.switch` picks the row's
*layout* (how many calls to which network), so a branch that is not used costs nothing. Which condition is dropped, time
shifts and weights are data: guidances with the same layouts share one compiled program, and sweeps compile once.

Every draw for sample i is a function of (seed, i, row) alone. This file loads nothing and writes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.denoiser import Denoiser, Params, Prediction
from nag_jax.diffusion import guidance as guidance_tables
from nag_jax.diffusion.call_plan import (
    Layout,
    call_rows,
    check_guidance,
    check_labels,
    check_mixing,
    check_networks,
    layout_of,
    observed_rows,
)
from nag_jax.diffusion.corrections import Correction
from nag_jax.diffusion.guidance import MODEL, Guidance
from nag_jax.diffusion.process import expand_like
from nag_jax.diffusion.stepping import Euler, GuidedPrediction, Stepper
from nag_jax.diffusion.time_posterior import Estimator, TimePosterior
from nag_jax.errors import UserError

# Quadrature nodes of the posterior null branch, each one evaluation of the network.
NUM_POSTERIOR_NODES = 7

Observer = Callable[[Params, jax.Array, jax.Array], Any]


class Samples(NamedTuple):
    """What sampling gives.

    Attributes:
        x: samples [B, ...] float32; images and latents in [-1, 1] and latent units, unclipped.
        observations: pytree with leaves [T, B, ...], or None without an observer.
        times: the times [T] of the observations, float64.
        evaluations_per_image: network evaluations that each sample took, all networks and branches together.
    """

    x: jax.Array
    observations: Any
    times: np.ndarray
    evaluations_per_image: int


@dataclasses.dataclass(frozen=True)
class Program:
    """All that is static in a compiled sampling program."""

    networks: tuple[tuple[str, Denoiser], ...]
    stepper: Stepper
    layouts: tuple[Layout, ...]
    updates: tuple[Callable[..., jax.Array], ...]
    posterior: TimePosterior | None
    num_posterior_nodes: int
    observer: Observer | None


class Sampler:
    """A sampling program for one denoiser and one or several guidances on the same noise.

    Args:
        denoiser: what is sampled.
        guidances: guidances by name; they share one compiled program.
        stepper: how states move.
        num_steps: steps of the stepper.
        networks: other denoisers that branches name ("weak", "original", ...).
        corrections: applied to every guided prediction, in order.
        estimator: time posterior for posterior null branches and corrections.
        num_posterior_nodes: network evaluations per posterior null branch.
        observer: called with (observer_params, x, t) at chosen rows, inside the scan; its answers come back.
        observer_params: passed to `observer`.
        observe_times: times to observe at; the nearest row each. None observes every row.

    Raises:
        UserError: a branch needs a network, null condition or estimator that is not there, the stepper needs what the
            prediction does not determine, or the networks' processes differ.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidances: Mapping[str, Guidance],
        *,
        stepper: Stepper,
        num_steps: int,
        networks: Mapping[str, Denoiser] | None = None,
        corrections: Sequence[Correction] = (),
        estimator: Estimator | None = None,
        num_posterior_nodes: int = NUM_POSTERIOR_NODES,
        observer: Observer | None = None,
        observer_params: Params = None,
        observe_times: Sequence[float] | None = None,
    ):
        self.denoiser = denoiser
        all_networks = {MODEL: denoiser, **(networks or {})}
        for name, guidance in guidances.items():
            check_guidance(name, guidance, all_networks, estimator)
        check_networks(denoiser, all_networks)
        if corrections and estimator is None:
            raise UserError("A correction needs a time posterior: pass `estimator`.")

        step_rows = stepper.schedule(denoiser.process, num_steps)
        times = step_rows["t"]
        for kind in stepper.needs(denoiser.process):
            denoiser.process.check_conversion(times, denoiser.prediction, kind)
        observed = observed_rows(step_rows, observe_times) if observer is not None else np.zeros(len(times), bool)
        self.observed_times = times[observed]
        self.num_rows = len(times)

        tables = {
            name: guidance.tables(times, denoiser.sample_shape[-1]) for name, guidance in guidances.items()
        }
        for name in tables:
            check_mixing(denoiser, all_networks, times, tables[name])
        row_layouts = {name: [layout_of(table) for table in tables[name]] for name in tables}
        layouts = tuple(sorted({layout for rows in row_layouts.values() for layout in rows}))
        shared_rows: dict[str, Any] = {
            "step": step_rows,
            "index": np.arange(len(times), dtype=np.uint32),
            "observe": observed,
            "corrections": [correction.weights(times) for correction in corrections],
        }
        self._rows: dict[str, Any] = {
            name: shared_rows | call_rows(tables[name], row_layouts[name], layouts) for name in tables
        }
        self.evaluations_per_image = {
            name: sum(
                calls.num_slots * (num_posterior_nodes if calls.is_posterior else 1)
                for layout in row_layouts[name]
                for calls in layout
            )
            for name in tables
        }
        # A correction asks the estimator once in every row in which it acts, a posterior branch once for its nodes.
        corrected_rows = sum(int(np.count_nonzero(weights)) for weights in shared_rows["corrections"])
        self.estimator_calls_per_image = {
            name: corrected_rows
            + sum(calls.num_slots for layout in row_layouts[name] for calls in layout if calls.is_posterior)
            for name in tables
        }
        self.program = Program(
            networks=tuple((name, network.without_params()) for name, network in all_networks.items()),
            stepper=stepper,
            layouts=layouts,
            updates=tuple(correction.update for correction in corrections),
            posterior=estimator.posterior if estimator else None,
            num_posterior_nodes=num_posterior_nodes,
            observer=observer,
        )
        self._params = {
            "networks": {name: network.params for name, network in all_networks.items()},
            "posterior": estimator.params if estimator else None,
            "observer": observer_params,
        }

    def __call__(
        self,
        guidance_name: str,
        labels: np.ndarray | jax.Array,
        *,
        seed: int,
        indices: np.ndarray | jax.Array,
        initial: jax.Array | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Samples:
        """Draws one batch of samples.

        Args:
            guidance_name: one of the names given at construction.
            labels: int32 [B] in [0, num_classes).
            seed: seed of the whole set of samples.
            indices: each sample's index in the set [B]; with the seed it determines the sample's noise.
            initial: states to start from [B, ...] instead of noise.
            sharding: of the samples over devices, by which labels and indices (of all of them, on every host) are
                placed; None leaves them where they are.

        Returns:
            The samples.
        """
        check_labels(labels, self.denoiser.num_classes)
        states_shape = (len(labels), *self.denoiser.sample_shape)
        if np.shape(indices) != states_shape[:1]:
            raise UserError(f"indices has shape {np.shape(indices)}; one index for each of {len(labels)} labels.")
        if initial is not None:
            initial = jnp.asarray(initial, float)
            if initial.shape != states_shape:
                raise UserError(f"initial has shape {initial.shape}; the labels and the denoiser ask {states_shape}.")
        if sharding is not None:
            on_host = (np.asarray(labels, np.int32), np.asarray(indices, np.uint32))
            labels, indices = (jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in on_host)
        x, observations = _run(
            self.program,
            self._params,
            jnp.asarray(labels, jnp.int32),
            jnp.asarray(indices, jnp.uint32),
            jax.random.key(seed, impl="threefry2x32"),
            jax.tree.map(jnp.asarray, self._rows[guidance_name]),
            initial,
        )
        if self.program.observer is not None:
            observed = np.flatnonzero(self._rows[guidance_name]["observe"])
            observations = jax.tree.map(lambda leaf: leaf[observed], observations)
        return Samples(x, observations, self.observed_times, self.evaluations_per_image[guidance_name])


    def lower(
        self, guidance_name: str, labels: jax.ShapeDtypeStruct, indices: jax.ShapeDtypeStruct
    ) -> jax.stages.Lowered:
        """The program of a call, lowered for the devices of its arguments and not run; arguments need no values.

        Args:
            guidance_name: one of the names given at construction; the networks' parameters may be shapes too.
            labels: int32 [B], shape and sharding.
            indices: uint32 [B], shape and sharding.
        """
        key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
        return _run.lower(self.program, self._params, labels, indices, key, self._rows[guidance_name], None)


def sample(
    denoiser: Denoiser,
    labels: np.ndarray | jax.Array,
    *,
    seed: int,
    first_index: int = 0,
    stepper: Stepper | None = None,
    num_steps: int = 50,
    guidance: Guidance | None = None,
    networks: Mapping[str, Denoiser] | None = None,
    corrections: Sequence[Correction] = (),
    estimator: Estimator | None = None,
    num_posterior_nodes: int = NUM_POSTERIOR_NODES,
    initial: jax.Array | None = None,
    observer: Observer | None = None,
    observer_params: Params = None,
    observe_times: Sequence[float] | None = None,
) -> Samples:
    """Draws samples for `labels` from `denoiser`, in one compiled program.

    Args:
        denoiser: see `nag_jax.load` or `nag_jax.denoiser`.
        labels: int32 [B] in [0, num_classes).
        seed: seed of the set of samples.
        first_index: index of the first label in the set; sample i is the same however the set is cut into calls.
        stepper: `Euler()` if None.
        num_steps: steps of the stepper.
        guidance: no guidance if None.
        networks: other denoisers that branches name.
        corrections: applied to every guided prediction, in order.
        estimator: time posterior for posterior null branches and corrections.
        num_posterior_nodes: network evaluations per posterior null branch.
        initial: states to start from [B, ...] instead of noise.
        observer: called with (observer_params, x, t) inside the scan.
        observer_params: passed to `observer`.
        observe_times: times to observe at, the nearest row each; None observes every row.

    Returns:
        The samples; x in [-1, 1] for images, unclipped. `nag_jax.to_uint8` makes pictures of them.

    Raises:
        UserError: see `Sampler`; or a label is out of range.
    """
    sampler = Sampler(
        denoiser,
        {"guidance": guidance if guidance is not None else guidance_tables.plain()},
        stepper=stepper if stepper is not None else Euler(),
        num_steps=num_steps,
        networks=networks,
        corrections=corrections,
        estimator=estimator,
        num_posterior_nodes=num_posterior_nodes,
        observer=observer,
        observer_params=observer_params,
        observe_times=observe_times,
    )
    indices = first_index + np.arange(len(labels), dtype=np.uint32)
    return sampler("guidance", labels, seed=seed, indices=indices, initial=initial)


def initial_noise(seed: int, indices: jax.Array, sample_shape: tuple[int, ...]) -> jax.Array:
    """The standard normal states [B, ...] that samples `indices` [B] of a set with `seed` start from."""
    keys = _sample_keys(jax.random.key(seed, impl="threefry2x32"), jnp.asarray(indices, jnp.uint32))
    return _draw(keys, jnp.uint32(0), sample_shape)


def _sample_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def _draw(keys: jax.Array, stream: jax.Array, sample_shape: tuple[int, ...]) -> jax.Array:
    """Standard normal draws [B, ...]: stream 0 is the initial noise, stream r + 1 the noise of row r."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), sample_shape))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    program: Program,
    params: Params,
    labels: jax.Array,
    indices: jax.Array,
    key: jax.Array,
    rows: Any,
    initial: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Scans over the rows; returns the samples and what the observer said at every row."""
    networks = dict(program.networks)
    denoiser = networks[MODEL]
    # Casts of the parameters within the scan would run again for every row.
    prepared = {name: networks[name].prepare(values) for name, values in params["networks"].items()}
    params = {**params, "networks": prepared}
    keys = _sample_keys(key, indices)
    x = _draw(keys, jnp.uint32(0), denoiser.sample_shape) if initial is None else initial

    def advance(carry: Any, row: Any) -> tuple[Any, Any]:
        x = program.stepper.state(carry)
        t = jnp.broadcast_to(row["step"]["t"], labels.shape)
        mix = [functools.partial(_mix, program, layout) for layout in program.layouts]
        mixed = jax.lax.switch(row["layout"], mix, params, x, t, labels, row["calls"])
        prediction = GuidedPrediction(denoiser.process, denoiser.prediction, x, t, mixed.value, mixed.variance)
        for update, weight in zip(program.updates, row["corrections"], strict=True):
            corrected = functools.partial(_correct, program, update, params, prediction)
            value = jax.lax.cond(weight != 0.0, corrected, lambda weight, value: value, weight, prediction.value)
            prediction = prediction._replace(value=value)
        noise = _draw(keys, row["index"] + 1, denoiser.sample_shape) if program.stepper.is_stochastic else None
        observation = _observe(program, params, x, t, row["observe"])
        return program.stepper.advance(carry, prediction, row["step"], noise), observation

    carry, observations = jax.lax.scan(advance, program.stepper.init(x), rows)
    return program.stepper.state(carry), observations


def _correct(
    program: Program,
    update: Callable[..., jax.Array],
    params: Params,
    prediction: GuidedPrediction,
    weight: jax.Array,
    value: jax.Array,
) -> jax.Array:
    return update(prediction._replace(value=value), weight, program.posterior, params["posterior"])


def _observe(program: Program, params: Params, x: jax.Array, t: jax.Array, is_observed: jax.Array) -> Any:
    if program.observer is None:
        return None
    ask = functools.partial(program.observer, params["observer"])
    shapes = jax.eval_shape(ask, x, t)
    return jax.lax.cond(
        is_observed,
        ask,
        lambda x, t: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        x,
        t,
    )


def _mix(
    program: Program, layout: Layout, params: Params, x: jax.Array, t: jax.Array, labels: jax.Array, slots: Any
) -> Prediction:
    """Evaluates a row's calls and mixes them. The first slot of the first calls is the base branch."""
    networks = dict(program.networks)
    model = networks[MODEL]
    total = jnp.zeros_like(x)
    base: Prediction | None = None
    for calls in layout:
        network, network_params = networks[calls.network], params["networks"][calls.network]
        slot = {name: values[: calls.num_slots] for name, values in slots[calls.key].items()}
        if calls.is_posterior:
            assert base is not None  # layout_of puts the base branch, which is never a posterior one, first.
            guided = GuidedPrediction(model.process, model.prediction, x, t, base.value, None)
            ask = functools.partial(_posterior_null, program, network, network_params, params["posterior"], guided)
            values = jnp.stack([ask(labels, drop_label) for drop_label in slot["drop_label"]])
        else:
            predictions = _evaluate_calls(network, network_params, x, t, labels, slot)
            to_model_kind = functools.partial(
                model.process.convert, x=x, t=t, source=network.prediction, target=model.prediction
            )
            values = jax.vmap(to_model_kind)(predictions.value)
            if base is None:
                variances = predictions.variance
                base = Prediction(values[0], None if variances is None else variances[0])
        # Weights are [calls, channels].
        weights = slot["weight"].reshape((calls.num_slots,) + (1,) * (x.ndim - 1) + (x.shape[-1],))
        total = total + jnp.sum(weights * values, axis=0)
    assert base is not None
    return Prediction(total, base.variance)


def _evaluate_calls(
    network: Denoiser, params: Params, x: jax.Array, t: jax.Array, labels: jax.Array, slot: Mapping[str, jax.Array]
) -> Prediction:
    """All calls as one batch: value [calls, B, ...] and variance likewise.

    A sample's calls stand side by side in it, so that over several devices each sample stays where it is.
    """
    count, batch = slot["drop_label"].shape[0], x.shape[0]
    repeated_t = jnp.clip(t[:, None] + slot["time_shift"], 0.0, 1.0).reshape(-1)
    prediction = network(
        params,
        jnp.repeat(x, count, axis=0),
        repeated_t,
        jnp.repeat(labels, count),
        drop_label=jnp.tile(slot["drop_label"], batch),
        drop_noise=jnp.tile(slot["drop_noise"], batch),
    )
    return jax.tree.map(lambda leaf: leaf.reshape(batch, count, *x.shape[1:]).swapaxes(0, 1), prediction)


def _posterior_null(
    program: Program,
    network: Denoiser,
    network_params: Params,
    posterior_params: Params,
    base: GuidedPrediction,
    labels: jax.Array,
    drop_label: jax.Array,
) -> jax.Array:
    """The null branch s(x) ~ sum_k p(t_k|x) s(x|t_k), each score from a prediction converted at its own t_k.

    It is returned as a prediction of the base's kind, by way of its difference to the base's score, which stays regular
    where a score alone does not determine a velocity.
    """
    assert program.posterior is not None  # check_guidance has seen the estimator.
    x, process = base.x, base.process
    nodes, weights = program.posterior.quadrature(posterior_params, x, program.num_posterior_nodes)
    dropped = jnp.broadcast_to(drop_label, labels.shape)

    def add_node(total: jax.Array, node: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, weight = node
        prediction = network(network_params, x, t, labels, drop_label=dropped)
        score = process.convert(prediction.value, x, t, network.prediction, "score")
        return total + expand_like(weight, x) * score, None

    # One node at a time: memory stays that of a single evaluation.
    null_score, _ = jax.lax.scan(add_node, jnp.zeros_like(x), (nodes, weights))
    difference = null_score - base.read_as("score")
    return base.value + process.score_difference(difference, base.t, base.kind)
