"""`--mode=train`: trains, evaluates at the end, and writes the report. Read it from top to bottom.

What a step computes is `training/step.py`, what is evaluated `jobs/evaluate.py`, what the report says `report.py`.
Resuming is the same command again: the newest checkpoint is restored and the data go on at its step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from nag_jax import loading, storage
from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config, check_resume, from_config_dict, to_dict
from nag_jax.data.pipeline import make_batches
from nag_jax.diffusion.objective import summarize_buckets
from nag_jax.errors import TrainingDivergedError, UserError
from nag_jax.hosts import check_same, check_shared, from_first, is_first
from nag_jax.jobs import evaluate
from nag_jax.jobs.attention_choice import settled
from nag_jax.jobs.experiment import (
    ORIGINAL_FOLDER,
    Experiment,
    TrainedNetwork,
    check_sampling,
    open_training,
)
from nag_jax.jobs.goodput import TRAINING, Goodput
from nag_jax.jobs.interrupt import Stopped, stop_on_signals
from nag_jax.jobs.profile import StepProfiler
from nag_jax.jobs.results import check_judge
from nag_jax.metric_writer import MetricWriter
from nag_jax.models.dit import init_params
from nag_jax.parallel import (
    batch_part,
    batch_sharding,
    check_batch_size,
    init_sharded,
    param_shardings,
    place,
    pmap_sharding,
    shard_batch,
    split_batch,
    to_host,
)
from nag_jax.params_hash import params_hash
from nag_jax.progress import progress, stage
from nag_jax.training.ema import decay_per_step
from nag_jax.training.optimizer import NULL_NOISE_EMBEDDING, learning_rate, make_optimizer
from nag_jax.training.state import TrainState, init_state
from nag_jax.training.step import TrainStep, jit_train_step, make_train_step, pmap_train_step, several_steps

PMAP_AXIS = "batch"
# Where the time of a training process goes besides TRAINING and waiting for data.
STARTING, COMPILING, SAVING, EVALUATING = "start", "compile", "logging and saving", "evaluation"
CONFIG_FILE = "config.json"


def run(config: Config, workdir: epath.Path, start: float | None = None) -> epath.Path:
    """Trains to `config.num_steps` and returns the path of the report.

    Args:
        config: the settings.
        workdir: the work folder.
        start: when the process began, in seconds of `time.perf_counter`, for goodput; now if None.

    Raises:
        UserError: see the message; nothing was written over.
        TrainingDivergedError: a loss was not finite.
        Stopped: Ctrl-C or SIGTERM; the state is saved.
    """
    start = time.perf_counter() if start is None else start
    # 1. Everything is checked before anything is written.
    experiment = open_run(config, workdir)

    # 2. The folder says what it is, and keeps what it starts from.
    check_same("set of training data", experiment.train_source.fingerprint)
    if config.init_from and not from_first((workdir / ORIGINAL_FOLDER / loading.MODEL_FILE).exists):
        keep_original(experiment)
    if is_first():
        storage.write_json(workdir / CONFIG_FILE, to_dict(config))
        loading.write_description(workdir, experiment.description)
    check_shared(workdir / loading.MODEL_FILE)

    # 3. The state: born sharded, or restored bit for bit. 4. The loop.
    with (
        Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every_steps=config.checkpoint.keep_every_steps,
        ) as checkpoints,
        Goodput(start) as goodput,
    ):
        state, shardings = make_state(experiment, checkpoints)
        first_step = int(state.step)
        if first_step and is_first():
            print(f"Going on at step {first_step} of {workdir}.", file=sys.stderr, flush=True)
        if first_step < config.num_steps:
            state = train(experiment, checkpoints, state, shardings, goodput)

    # 5. What the trained network does, and the report.
    return evaluate.evaluate_and_report(experiment, trained_network(experiment, state))


def open_run(config: Config, workdir: epath.Path) -> Experiment:
    """Opens data and devices, and checks all that the run will need; nothing is written.

    Raises:
        UserError: the folder is that of another run, the data or the network cannot be had, or sampling at the end
            would be refused.
    """
    if (workdir / CONFIG_FILE).exists():
        check_resume(from_config_dict(storage.read_json(workdir / CONFIG_FILE)), config)
    experiment = open_training(config, workdir)
    check_batch(config, experiment.mesh)
    batch_part(experiment.mesh, config.batch_size)  # refuses a mesh on which this process' rows are not in one piece
    check_start(config, workdir)
    check_weights(config)
    step_function(config, experiment.description)  # refuses a network, an objective or a schedule that cannot be
    if (workdir / loading.MODEL_FILE).exists():
        check_same_network(experiment)
    if config.eval.methods:
        check_sampling(experiment, evaluate.make_methods(config), needs_data=evaluate.needs_data(config))
        check_judge(config)
    return experiment


def check_batch(config: Config, mesh: Mesh) -> None:
    """Refuses a batch of which a device would not have equally many rows in every micro-batch, in either mode."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    check_batch_size(
        config.batch_size,
        parts * config.optimizer.accumulation_steps,
        "parallel.data x parallel.fsdp x optimizer.accumulation_steps",
    )


def check_start(config: Config, workdir: epath.Path) -> None:
    """Refuses to go on from a step at which no dispatch begins."""
    folder, together = workdir / "checkpoints", config.parallel.steps_per_dispatch
    if together == 1 or not from_first(folder.exists):
        return
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.latest_step() or 0
    if step % together:
        raise UserError(
            f"The run stands at step {step}, no multiple of parallel.steps_per_dispatch = {together}. Make it a "
            "divisor of the step."
        )


def check_weights(config: Config) -> None:
    """Refuses an evaluation of weights that the run would not have, before training it."""
    if config.sampling.weights != "params" and config.sampling.weights not in config.ema:
        raise UserError(
            f"sampling.weights = {config.sampling.weights!r} is not an average of this run. "
            f"Known: params, {', '.join(config.ema)}."
        )


def trained_network(experiment: Experiment, state: TrainState) -> TrainedNetwork:
    """The weights of a state that `sampling.weights` names."""
    weights = experiment.config.sampling.weights
    params = state.params if weights == "params" else state.ema[weights]
    return TrainedNetwork(experiment.place(params), int(state.step), params_hash(to_host(params)))


def check_same_network(experiment: Experiment) -> None:
    """Raises UserError if the work folder is that of another network: other data, classes or latents."""
    stored, current = to_dict(loading.read_description(experiment.workdir)), to_dict(experiment.description)
    # The model is a matter of the config, which was compared.
    differing = [name for name in stored if name != "model" and stored[name] != current[name]]
    if differing:
        raise UserError(
            f"The network in {experiment.workdir} is another one than these data and settings make: its "
            + "; ".join(f"{name} was {stored[name]}, is {current[name]}" for name in differing)
            + ". Choose another --workdir, or the data that it was trained on."
        )


def keep_original(experiment: Experiment) -> None:
    """Keeps the network that training starts from in the work folder, so that nothing depends on `init_from` later."""
    config = experiment.config
    with stage("keeping the original network"):
        params = loading.read_params(epath.Path(config.init_from), config.sampling.weights)
        description = loading.read_description(config.init_from)
        loading.write_network(experiment.workdir / ORIGINAL_FOLDER, description, params)


def fresh_state(config: Config, description: loading.ModelDescription, key: jax.Array) -> TrainState:
    """The state of a run that starts afresh; pure, so that it can be made sharded, or its shapes alone."""
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    return init_state(init_params(description.network(), key), optimizer, tuple(config.ema))


def step_function(config: Config, description: loading.ModelDescription) -> TrainStep:
    """The training step of a config, not compiled yet."""
    return make_train_step(
        description.denoiser(),
        config.objective,
        make_optimizer(config.optimizer, config.num_steps),
        {name: decay_per_step(average, config.batch_size) for name, average in config.ema.items()},
        accumulation_steps=config.optimizer.accumulation_steps,
        axis_name=PMAP_AXIS if config.parallel.mode == "pmap" else None,
    )


def make_state(experiment: Experiment, checkpoints: Checkpoints) -> tuple[TrainState, Any]:
    """The state to go on from and its shardings: the newest checkpoint, `init_from`, or fresh parameters."""
    config, mesh = experiment.config, experiment.mesh
    fresh = functools.partial(fresh_state, config, experiment.description)
    key = jax.random.key(config.seed, impl="threefry2x32")
    if checkpoints.latest_step() is not None:
        abstract = jax.eval_shape(fresh, key)
        shardings = param_shardings(mesh, abstract)
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
        state, _ = checkpoints.restore(placed)
        return state, shardings
    if config.init_from:
        original = experiment.workdir / ORIGINAL_FOLDER
        optimizer = make_optimizer(config.optimizer, config.num_steps)
        params = loading.read_for_fine_tuning(original, experiment.description, "ema", config.seed)
        return init_sharded(lambda params: init_state(params, optimizer, tuple(config.ema)), mesh, params)
    return init_sharded(fresh, mesh, key)


def train(
    experiment: Experiment, checkpoints: Checkpoints, state: TrainState, shardings: Any, goodput: Goodput
) -> TrainState:
    """The training loop, from `state.step` to `config.num_steps`."""
    config, mesh, workdir = experiment.config, experiment.mesh, experiment.workdir
    is_pmap, together = config.parallel.mode == "pmap", config.parallel.steps_per_dispatch
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.optimizer.accumulation_steps)
    function = step_function(config, settled(experiment, "training", rows=rows))
    if is_pmap:
        train_step = pmap_train_step(function, PMAP_AXIS)
    elif together > 1:
        train_step = jit_train_step(several_steps(function), mesh, shardings, batch_sharding(mesh))
    else:
        train_step = jit_train_step(function, mesh, shardings, batch_sharding(mesh))
    rate = learning_rate(config.optimizer, config.num_steps)
    # The stream of training draws differs from the one that made the parameters.
    run_key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), 1)

    if is_pmap:
        state = place(state, pmap_sharding(PMAP_AXIS))
        part, num_parts = jax.process_index(), jax.process_count()
    else:
        part, num_parts = batch_part(mesh, config.batch_size)
    first_step = int(state.step)
    batches = make_batches(
        experiment.train_source,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first_step,
        process_index=part,
        process_count=num_parts,
    )
    # Before the first step, so that a run that is killed or diverges says under which flags it did.
    experiment.add_to_environment("training", parameters=count_parameters(state.params))
    writer = MetricWriter(workdir, first_step) if is_first() else None
    unread: list[Any] = []  # metrics of the steps since the last log step, still on the devices
    metrics: Any = None
    log_step = first_step
    goodput.spend(STARTING)

    if first_step and is_evaluation_due(config, first_step):
        # The run may have been interrupted between its checkpoint and its evaluation; a finished one is read back.
        evaluate.evaluate(experiment, trained_network(experiment, state))
        goodput.spend(EVALUATING)
    with (
        contextlib.closing(batches),
        StepProfiler(config.log.profile_steps, workdir) as profiler,
        stop_on_signals(at_one_step=True) as stop,
        progress("training", config.num_steps, first_step) as report_progress,
    ):
        for step in range(first_step + together, config.num_steps + 1, together):
            profiler.before(step - together + 1, step)
            host_batches = goodput.read(lambda: [next(batches) for _ in range(together)], running=metrics)
            placed: list[Any] = []
            for batch in host_batches:
                arrays = {name: rows for name, rows in batch.items() if name != "index"}
                placed.append(split_batch(arrays) if is_pmap else shard_batch(mesh, arrays))
            state, metrics = train_step(state, tuple(placed) if together > 1 else placed[0], run_key)
            unread.append(metrics)
            profiler.after(step, metrics)

            if step == first_step + together:
                jax.block_until_ready(metrics)
                goodput.spend(COMPILING)
                log_step = step

            # Asked once: a signal that comes later in this round is seen in the next one, after a save.
            is_stopped = stop.is_due()
            is_last = step == config.num_steps or is_stopped
            is_saved = step % config.checkpoint.every_steps == 0 or is_last
            is_evaluated = is_evaluation_due(config, step) and not is_last
            is_logged = step % config.log.every_steps == 0 or is_saved or is_evaluated
            if is_logged:
                # A state is saved only after every loss up to it was seen to be finite.
                numbers = read_metrics(unread, last_step=step, checkpoints=checkpoints)
                elapsed = goodput.spend(TRAINING)
                if step > log_step:
                    numbers["examples_per_second"] = (step - log_step) * config.batch_size / elapsed
                numbers["learning_rate"] = float(rate(step - 1))
                numbers["goodput"] = goodput.value
                if writer is not None:
                    writer.write(step, numbers)
                report_progress(step, f"loss {numbers['loss']:.4f}")
                unread = []
                log_step = step
            if is_saved:
                if writer is not None:
                    writer.flush()
                # Under pmap each process holds a state of its own, all alike; what is saved is one.
                checkpoints.save(place(state, pmap_sharding(PMAP_AXIS)) if is_pmap else state)
            if is_logged:
                goodput.spend(SAVING)
            if is_evaluated:
                evaluate.evaluate(experiment, trained_network(experiment, state))
                goodput.spend(EVALUATING)
            if is_stopped:
                break
    with stage("saving the last checkpoint"):
        checkpoints.wait()
    goodput.spend(SAVING)
    if writer is not None:
        writer.close()
    # What evaluations took they add themselves.
    experiment.add_seconds(**{name: each for name, each in goodput.seconds.items() if name != EVALUATING})
    # Asked once more, for a signal in the last round.
    if stop.is_due():
        raise Stopped(stop, f"Stopped at step {int(state.step)}; saved. The same command goes on from there.")
    return state


def count_parameters(params: Any) -> dict[str, int]:
    """How many parameters the network has without its null noise embedding, and how many that has."""
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    null_noise = counts.pop(NULL_NOISE_EMBEDDING)
    return {"network": sum(counts.values()), "null_noise_embedding": null_noise}


def is_evaluation_due(config: Config, step: int) -> bool:
    """Whether a scheduled evaluation belongs to `step`."""
    return bool(config.eval.methods) and config.eval.every_steps > 0 and step % config.eval.every_steps == 0


def read_metrics(unread: list[Any], *, last_step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """Fetches the metrics of the steps up to `last_step` and averages them.

    Raises:
        TrainingDivergedError: a loss, a gradient or the new parameters are not finite; names the first such step and
            the last good checkpoint.
    """
    fetched = jax.device_get(unread)
    scalars = ("loss", "grad_norm", "param_norm")
    # Several steps of one dispatch have their metrics together.
    values = np.array([np.concatenate([np.atleast_1d(metrics[name]) for metrics in fetched]) for name in scalars]).T
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        bad_row, bad_column = np.argwhere(~np.isfinite(values))[0]
        bad_step = last_step - len(values) + 1 + int(bad_row)
        checkpoints.wait()
        good = checkpoints.latest_step()
        remedy = f"The last good checkpoint is step {good}" if good is not None else "There is no checkpoint yet"
        raise TrainingDivergedError(
            f"The {scalars[bad_column]} of step {bad_step} is {values[bad_row, bad_column]}. {remedy} in "
            f"{checkpoints.directory}. Lower optimizer.learning_rate, set optimizer.clip_norm, or look at the data."
        )
    numbers = dict(zip(scalars, values.mean(axis=0).tolist(), strict=True))
    num_axes = np.ndim(fetched[0]["loss"])
    buckets = {
        name: sum(metrics["buckets"][name].sum(axis=tuple(range(num_axes))) for metrics in fetched)
        for name in fetched[0]["buckets"]
    }
    return numbers | summarize_buckets(buckets)
