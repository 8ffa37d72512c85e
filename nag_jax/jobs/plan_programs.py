"""The programs of training and sampling, compiled for devices that need not be there: memory, collectives, roofline.

Shapes stand in for all arrays, so nothing is allocated and no data are read; the programs are those that `train` and
`sample` run. Decoding latents to images is left out. Which settings are worth compiling is `jobs/plan.py`'s affair.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nag_jax import flops
from nag_jax.config import Config
from nag_jax.denoiser import Denoiser
from nag_jax.jobs.drawing import sampling_batch_size
from nag_jax.jobs.methods import Method, make_samplers
from nag_jax.jobs.train import check_batch, fresh_state, step_function
from nag_jax.loading import ModelDescription
from nag_jax.models.dit import init_params
from nag_jax.parallel import batch_sharding, make_mesh, param_shardings
from nag_jax.plan.collectives import Collective, find_collectives, summarize
from nag_jax.plan.roofline import roofline
from nag_jax.plan.topologies import Topology
from nag_jax.training.step import jit_train_step, several_steps

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as the compiler plans them.

    Attributes:
        arguments: what goes in: the state and the batch.
        outputs: what comes out beyond the arguments that are written over.
        temporaries: what lives in between, at its largest.
        code: the program.
        peak: of all this, what is needed at once at most; less than `total` where temporaries are not all there at the
            same time. It is what the TPU compiler compares with what a device has.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """All together."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that was compiled.

    Attributes:
        memory: None if the compiler says that it does not fit.
        needed_bytes: what is compared with what a device has: for TPUs `memory.peak`, or what their compiler says that
            it would have needed (None if it does not say); for others, whose compilers refuse nothing, `memory.total`.
        collectives: what the devices exchange; empty if it was not compiled.
        compile_seconds: wall time on this machine.
        flops: operations of all devices together, counted by `nag_jax.flops`: what is rematerialised counts once.
        moved_bytes: what each device has to read and write at least; 0 if it was not compiled.
        images: how many it trains on, or makes.
    """

    memory: Memory | None
    needed_bytes: float | None
    collectives: tuple[Collective, ...]
    compile_seconds: float
    flops: float
    moved_bytes: float
    images: int

    def fits(self, topology: Topology) -> bool:
        """Whether it fits on the topology's devices: what was compiled, if less is needed than they are known to have.

        What the TPU compiler accepted fits.
        """
        if self.memory is None or is_tpu(topology):
            return self.memory is not None
        limit, needed = memory_limit(topology), self.needed_bytes
        return limit is None or needed is None or needed <= limit


def is_tpu(topology: Topology) -> bool:
    """Whether the compiler refuses what does not fit."""
    return topology.devices[0].platform == "tpu"


def memory_limit(topology: Topology) -> float | None:
    """Bytes of a device's memory; None where neither the device nor the table of chips says."""
    if topology.chip is not None:
        return topology.chip.hbm_bytes
    return (topology.devices[0].memory_stats() or {}).get("bytes_limit")


def state_bytes(config: Config, description: ModelDescription, mesh: Any) -> int:
    """Bytes of the training state on each device: parameters, moments, averages. Nothing is compiled.

    Args:
        config: the settings.
        description: the network.
        mesh: with the sizes of its axes.
    """
    state = _abstract_state(config, description)
    return sum(_shard_bytes(leaf, place) for leaf, place in _zip_leaves(state, param_shardings(mesh, state)))


def parameter_bytes(description: ModelDescription, mesh: Any) -> int:
    """Bytes of the parameters alone on each device. Nothing is compiled."""
    return sum(_shard_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(_abstract_params(description, mesh)))


def compile_training(config: Config, description: ModelDescription, topology: Topology) -> Program:
    """Compiles what `lower_training` makes; raises UserError as it does."""
    steps = config.parallel.steps_per_dispatch
    images = steps * config.batch_size
    return _compile(
        lower_training(config, description, topology),
        topology,
        images * flops.dit_training(description.model, description.sample_shape),
        images=images,
        runs=steps,
        writes=steps,
    )


def lower_training(config: Config, description: ModelDescription, topology: Topology) -> jax.stages.Lowered:
    """The training step, or so many as `parallel.steps_per_dispatch` runs at once, to be compiled for a topology.

    Raises:
        UserError: the mesh or the batch does not fit the devices' number, or the network cannot be made.
    """
    mesh = make_mesh(config.parallel, topology.devices)
    check_batch(config, mesh)
    state = _abstract_state(config, description)
    function = step_function(config, description)
    batches: Any = training_batch(config, description)
    steps = config.parallel.steps_per_dispatch
    if steps > 1:
        function, batches = several_steps(function), (batches,) * steps
    step = jit_train_step(function, mesh, param_shardings(mesh, state), batch_sharding(mesh))
    return step.lower(state, batches, _abstract_key())  # type: ignore[attr-defined]


def training_batch(config: Config, description: ModelDescription) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch: images, or the moments of latents, and labels."""
    height, width, channels = description.sample_shape
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    if description.latent is None:
        images = jax.ShapeDtypeStruct((config.batch_size, height, width, channels), jnp.float32)
        return {"image": images, "label": labels}
    moments = jax.ShapeDtypeStruct((config.batch_size, height, width, 2 * channels), jnp.float16)
    return {"moments": moments, "label": labels}


def compile_sampling(
    config: Config, description: ModelDescription, topology: Topology, methods: Mapping[str, Method]
) -> tuple[str, Program]:
    """Compiles the sampler of `methods` for the one among them that evaluates the network most.

    Args:
        config: stepper, steps and batch.
        description: the network.
        topology: the devices.
        methods: by name; none of them needs an estimator. The original network of a fine-tuned one is taken to be like
            it.

    Returns:
        (the name of that method, the program).

    Raises:
        UserError: see `Sampler` and `make_mesh`.
    """
    mesh = make_mesh(config.parallel, topology.devices)
    place = batch_sharding(mesh)
    denoiser: Denoiser = description.denoiser(_abstract_params(description, mesh))
    original = denoiser if any(method.needs_original for method in methods.values()) else None
    samplers = make_samplers(config, denoiser, methods, original=original)
    name = max(samplers, key=lambda name: samplers[name].evaluations_per_image[name])
    evaluations = samplers[name].evaluations_per_image[name]
    batch_size = sampling_batch_size(config, mesh)
    with jax.set_mesh(mesh):  # as `drawing` does
        lowered = samplers[name].lower(
            name,
            jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=place),
            jax.ShapeDtypeStruct((batch_size,), jnp.uint32, sharding=place),
        )
    return name, _compile(
        lowered,
        topology,
        batch_size * flops.dit_sampling(description.model, description.sample_shape, evaluations),
        images=batch_size,
        # Every row of the sampler reads the parameters and goes through its temporaries again.
        runs=samplers[name].num_rows,
        writes=1,
    )


def report(program: Program, topology: Topology) -> dict[str, Any]:
    """A program's numbers by name, for JSON: memory and collectives in bytes on each device, times in seconds."""
    content: dict[str, Any] = {
        "fits": program.fits(topology),
        "needed_bytes": program.needed_bytes,
        "flops": program.flops,
        "images": program.images,
        "compile_seconds": program.compile_seconds,
    }
    if program.memory is None:
        return content
    content["memory"] = dataclasses.asdict(program.memory) | {"total": program.memory.total}
    content["collectives"] = summarize(program.collectives)
    content["received_bytes"] = received = sum(each.received_bytes for each in program.collectives)
    if topology.chip is not None:
        line = roofline(
            topology.chip,
            flops=program.flops / len(topology.devices),
            memory_bytes=program.moved_bytes,
            received_bytes=received,
        )
        content["roofline"] = dataclasses.asdict(line) | {
            "seconds": line.seconds,
            "seconds_without_overlap": line.seconds_without_overlap,
            "communication_share": line.communication_share,
        }
    return content


def _compile(
    lowered: jax.stages.Lowered, topology: Topology, operations: float, *, images: int, runs: int, writes: int
) -> Program:
    """Compiles; arguments are read and temporaries filled `runs` times, results written `writes` times."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Program(None, needed_bytes(str(error)), (), time.perf_counter() - start, operations, 0.0, images)
    seconds = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=analysis.peak_memory_in_bytes,
    )
    # At least: arguments are read, outputs written, and what lives in between is written and read.
    moved = runs * (memory.arguments + 2 * memory.temporaries) + writes * analysis.output_size_in_bytes
    collectives = find_collectives(compiled.as_text() or "")
    needed = memory.peak if is_tpu(topology) else memory.total
    return Program(memory, needed, collectives, seconds, operations, moved, images)


def needed_bytes(message: str) -> float | None:
    """What a program would have needed at once, arguments and outputs included.

    Args:
        message: of the compiler, of too little memory. What it calls temporaries is everything.

    Returns:
        Bytes on each device, or None if the message does not say.
    """
    found = re.search(r"Used ([\d.]+)([KMGT])\b|HLO temporaries \(([\d.]+)([KMGT])\)", message)
    if found is None:
        return None
    number, unit = found.group(1, 2) if found[1] else found.group(3, 4)
    return float(number) * _UNITS[unit]


def _abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))


def _abstract_state(config: Config, description: ModelDescription) -> Any:
    return jax.eval_shape(lambda key: fresh_state(config, description, key), _abstract_key())


def _abstract_params(description: ModelDescription, mesh: Any) -> Any:
    params = jax.eval_shape(lambda key: init_params(description.network(), key), _abstract_key())
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        param_shardings(mesh, params),
    )


def _zip_leaves(one: Any, other: Any) -> Any:
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def _shard_bytes(leaf: Any, sharding: Any) -> int:
    size = 1
    for length in sharding.shard_shape(leaf.shape):
        size *= length
    return size * leaf.dtype.itemsize
