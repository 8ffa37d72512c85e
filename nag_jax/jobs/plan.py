"""`--mode=plan`: what training and sampling would take on given devices, and what fits; nothing is trained or sampled.

The programs are `plan_programs`', which compile for a TPU without one. Times are a roofline, so estimates from below.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from nag_jax import storage
from nag_jax.autoencoder import VAE_FILE, VaeDescription
from nag_jax.config import Config, from_section, to_dict
from nag_jax.data import latent_shards
from nag_jax.data.catalogue import data_folder, find_builder
from nag_jax.denoiser import LatentSpace
from nag_jax.errors import UserError
from nag_jax.jobs.evaluate import make_methods
from nag_jax.jobs.experiment import commit, compiler_flags, version
from nag_jax.jobs.plan_programs import (
    Program,
    compile_sampling,
    compile_training,
    memory_limit,
    parameter_bytes,
    report,
    state_bytes,
)
from nag_jax.jobs.plan_text import table
from nag_jax.loading import ModelDescription, describe
from nag_jax.models.attention import AUTO, candidates, check_attention
from nag_jax.models.vae import VaeConfig
from nag_jax.parallel import make_mesh
from nag_jax.plan.search import Attempt, largest_fitting
from nag_jax.plan.topologies import LOCAL, Topology, open_topology
from nag_jax.progress import stage

MOST_COMPILATIONS = 6  # in the search of a batch size
# From what keeps most to what keeps least.
REMAT_ORDER = ("none", "dots", "dots_flash", "dots_no_batch", "full")


def run(config: Config, topology_name: str, workdir: epath.Path) -> epath.Path:
    """Plans a config on a topology; prints a table and returns the folder plan/NAME with conditions and plan.json.

    Args:
        config: the settings of the training.
        topology_name: see `topologies.open_topology`.
        workdir: where results go.

    Raises:
        UserError: the topology, the mesh or the network cannot be had, or shapes are not known without the data.
    """
    topology, description = open_plan(config, topology_name)
    conditions = plan_conditions(config, description, topology)
    folder = workdir / "plan" / folder_name(topology, conditions)
    if (folder / "plan.json").exists():
        content = storage.read_json(folder / "plan.json")
    else:
        content = make_plan(config, description, topology)
        storage.write_json(folder / "conditions.json", conditions)
        storage.write_json(folder / "plan.json", content)
    print(table(content), flush=True)
    return folder


def open_plan(config: Config, topology_name: str) -> tuple[Topology, ModelDescription]:
    """The devices and the network with the attention that they take. Raises UserError as `run` does."""
    if config.parallel.mode == "pmap":
        raise UserError("--mode=plan compiles for a mesh. Set config.parallel.mode = 'jit'; 'pmap' computes the same.")
    if topology_name != LOCAL:
        # The machine's own accelerators, if it has any, are not needed and stay free.
        jax.config.update("jax_platforms", "cpu")
    topology = open_topology(topology_name)
    make_mesh(config.parallel, topology.devices)
    description = describe_network(config)
    description.network()
    shape, device = description.attention_shape, topology.devices[0]
    if description.model.attention == AUTO:
        # A plan measures nothing, so it is of what a job would presumably take.
        return topology, description.with_attention(candidates(shape, device)[0])
    check_attention(description.model.attention, shape, device)
    return topology, description


def describe_plan(config: Config, topology_name: str, workdir: epath.Path) -> str:
    """What `run` would work on, in a few lines. Raises UserError as `run` does."""
    topology, description = open_plan(config, topology_name)
    mesh = make_mesh(config.parallel, topology.devices)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    folder = workdir / "plan" / folder_name(topology, plan_conditions(config, description, topology))
    return "\n".join(
        [
            "mode          plan",
            f"work folder   {folder}",
            f"devices       {topology.devices[0].device_kind} x{len(topology.devices)} ({axes})",
            f"network       states of shape {description.sample_shape}, {description.num_classes} classes",
            f"state         {state_bytes(config, description, mesh):,} bytes on each device",
            f"training      batches of {config.batch_size}",
            f"methods       {', '.join(make_methods(config)) or 'none'}",
        ]
    )


def describe_network(config: Config) -> ModelDescription:
    """The network that training under `config` would make, without its data.

    Latents that are encoded say what they are; for others the autoencoder of `data.vae` does, and where that is not
    there either, Stable Diffusion's is taken.

    Raises:
        UserError: the number of classes or the size of a latent is not known.
    """
    data = config.data
    if data.latents:
        folder = latent_shards.split_folder(data, data.split)
        if (folder / latent_shards.DATASET_FILE).exists():
            encoding = latent_shards.read_dataset(folder).encoding
            return describe(
                config, num_classes=encoding.num_classes, sample_shape=encoding.latent_shape, latent=encoding.latent
            )
    num_classes = count_classes(config)
    if not data.latents:
        return describe(config, num_classes=num_classes, sample_shape=(data.image_size, data.image_size, data.channels))
    autoencoder = VaeConfig()
    if data.vae and (epath.Path(data.vae) / VAE_FILE).exists():
        path = epath.Path(data.vae) / VAE_FILE
        autoencoder = from_section(VaeDescription, storage.read_json(path), str(path)).config
    side, rest = divmod(data.image_size, autoencoder.downsampling)
    if rest:
        raise UserError(f"data.image_size = {data.image_size} must be a multiple of {autoencoder.downsampling}.")
    return describe(
        config,
        num_classes=num_classes,
        sample_shape=(side, side, autoencoder.latent_channels),
        latent=LatentSpace(autoencoder.scaling_factor, autoencoder.downsampling),
    )


def count_classes(config: Config) -> int:
    """The classes of the data set `data.name`. Raises UserError for an image folder, whose data alone say it."""
    if config.data.name == "image_folder":
        raise UserError(
            "--mode=plan reads no data, and the number of classes of an image folder is not known without it. Plan "
            "with a data set of about as many classes, such as --config.data.name=imagenet2012, or encode it first."
        )
    classes: int = find_builder(config.data.name, data_folder(config.data.data_dir)).info.features["label"].num_classes
    return classes


def plan_conditions(config: Config, description: ModelDescription, topology: Topology) -> dict[str, Any]:
    """All that a plan depends on."""
    return {
        "topology": topology.name,
        "devices": f"{topology.devices[0].device_kind} x{len(topology.devices)}",
        "chip": None if topology.chip is None else dataclasses.asdict(topology.chip),
        "network": to_dict(description),
        "config": to_dict(config),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "libtpu", "flax")},
        "compiler_flags": compiler_flags(),
        "commit": commit(),
    }


def folder_name(topology: Topology, conditions: dict[str, Any]) -> str:
    """The topology and a digest of the conditions."""
    decisive = {key: value for key, value in conditions.items() if key != "commit"}
    return f"{topology.name.replace(':', '-')}-{storage.digest(decisive)}"


def make_plan(config: Config, description: ModelDescription, topology: Topology) -> dict[str, Any]:
    """Compiles, searches and suggests; the content of plan.json. Raises UserError as `run` does."""
    mesh = make_mesh(config.parallel, topology.devices)
    limit = memory_limit(topology)
    with stage(f"compiling the training step, batch {config.batch_size}"):
        program = compile_training(config, description, topology)
    content: dict[str, Any] = {
        "topology": topology.name,
        "devices": len(topology.devices),
        "device_kind": topology.devices[0].device_kind,
        "memory_limit": limit,
        "mesh": dict(mesh.shape),
        "training": settings(config)
        | {"num_steps": config.num_steps, "state_bytes": state_bytes(config, description, mesh)}
        | report(program, topology),
    }
    content["largest_batch"] = None if limit is None else largest_batch(config, description, topology, program)
    content["suggestion"] = None if program.fits(topology) else suggest(config, description, topology, program)
    content["sampling"] = plan_sampling(config, description, topology)
    return content


def settings(config: Config) -> dict[str, Any]:
    """What a plan may suggest to change."""
    return {
        "batch_size": config.batch_size,
        "data": config.parallel.data,
        "fsdp": config.parallel.fsdp,
        "tensor": config.parallel.tensor,
        "remat": config.model.remat,
    }


def largest_batch(
    config: Config, description: ModelDescription, topology: Topology, first: Program
) -> dict[str, int | None]:
    """The largest training batch that fits with everything else as it is.

    Returns:
        "fits", 0 if none does; "too_large", the smallest that is known not to; "compilations".
    """
    mesh = make_mesh(config.parallel, topology.devices)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.optimizer.accumulation_steps
    limit, fixed = memory_limit(topology), state_bytes(config, description, mesh)
    assert limit is not None

    def attempt(multiple: int) -> Attempt:
        size = multiple * unit
        with stage(f"compiling the training step, batch {size}"):
            program = compile_training(dataclasses.replace(config, batch_size=size), description, topology)
        return Attempt(program.fits(topology), program.needed_bytes)

    if fixed > limit:  # then nothing has to be compiled to know
        return {"fits": 0, "too_large": unit, "compilations": 0}
    known = {config.batch_size // unit: Attempt(first.fits(topology), first.needed_bytes)}
    largest = largest_fitting(
        attempt, known, limit=limit, fixed_bytes=fixed, max_attempts=MOST_COMPILATIONS
    )
    too_large = None if largest.too_large is None else largest.too_large * unit
    return {"fits": largest.fits * unit, "too_large": too_large, "compilations": len(known)}


def suggest(
    config: Config, description: ModelDescription, topology: Topology, first: Program
) -> dict[str, Any] | None:
    """What fits instead of `config`, compiled: the first of `alternatives`, or the last of them with fewer rows.

    Args:
        config: the settings.
        description: the network.
        topology: the devices.
        first: the program of `config`, which does not fit.

    Returns:
        Settings and report; where nothing fits, those of the smallest batch that was tried; None if nothing was, for
        not even the state fits.
    """
    split = split_over_all(config, len(topology.devices))
    state = state_bytes(split, description, make_mesh(split.parallel, topology.devices))
    limit = memory_limit(topology)
    if limit is None or state > limit:
        return None

    def compile_rows(candidate: Config, batch_size: int) -> Program:
        candidate = dataclasses.replace(candidate, batch_size=batch_size)
        with stage(f"trying {', '.join(f'{key} {value}' for key, value in settings(candidate).items())}"):
            # The network is described again: its rematerialisation is part of it.
            model = dataclasses.replace(description.model, remat=candidate.model.remat)
            described = dataclasses.replace(description, model=model)
            return compile_training(candidate, described, topology)

    candidate, program = config, first
    for candidate in alternatives(config, len(topology.devices), description.model.attention):
        program = compile_rows(candidate, config.batch_size)
        if program.fits(topology):
            return settings(candidate) | report(program, topology)
    unit = len(topology.devices) // config.parallel.tensor * config.optimizer.accumulation_steps
    batch_size, program = smaller_batch(
        lambda size: compile_rows(candidate, size), config.batch_size, unit, program, topology, state
    )
    return settings(candidate) | {"batch_size": batch_size} | report(program, topology)


def smaller_batch(
    compile_batch: Callable[[int], Program],
    batch_size: int,
    unit: int,
    first: Program,
    topology: Topology,
    fixed_bytes: float,
) -> tuple[int, Program]:
    """The largest batch below `batch_size` that is seen to fit, and its program; if none does, the smallest tried.

    Args:
        compile_batch: compiles for a batch.
        batch_size: one that does not fit.
        unit: what batches must be multiples of.
        first: the program of `batch_size`.
        topology: devices whose memory is known.
        fixed_bytes: what each needs for no rows.
    """
    programs = {batch_size // unit: first}

    def attempt(multiple: int) -> Attempt:
        program = programs[multiple] = compile_batch(multiple * unit)
        return Attempt(program.fits(topology), program.needed_bytes)

    known = {batch_size // unit: Attempt(False, first.needed_bytes)}
    limit = memory_limit(topology)
    assert limit is not None
    largest = largest_fitting(attempt, known, limit=limit, fixed_bytes=fixed_bytes, max_attempts=MOST_COMPILATIONS)
    found = largest.fits or min(programs)
    return found * unit, programs[found]


def split_over_all(config: Config, num_devices: int) -> Config:
    """`config` with parameters split over all devices, but for those of the tensor axis."""
    parallel = dataclasses.replace(config.parallel, data=1, fsdp=num_devices // config.parallel.tensor)
    return dataclasses.replace(config, parallel=parallel)


def alternatives(config: Config, num_devices: int, attention: str) -> Iterator[Config]:
    """Settings that need less memory than `config` for the same batch, the cheapest change first.

    Parameters split over all devices, which costs communication that partly hides; then keeping less and less for the
    backward pass besides, which costs up to a third more operations.
    """
    split = split_over_all(config, num_devices)
    weaker = REMAT_ORDER[REMAT_ORDER.index(config.model.remat) :]
    policies = [policy for policy in weaker if policy != "dots_flash" or attention != "xla"]
    for remat in policies:
        candidate = dataclasses.replace(split, model=dataclasses.replace(config.model, remat=remat))
        if candidate != config:
            yield candidate


def plan_sampling(config: Config, description: ModelDescription, topology: Topology) -> dict[str, Any] | None:
    """The sampler of `eval.methods`, of which those that ask an estimator are left out; None if there are no others."""
    methods = make_methods(config)
    planned = {name: method for name, method in methods.items() if not method.needs_estimator}
    left_out = [name for name in methods if name not in planned]
    if left_out:
        print(f"Not planned, for they ask an estimator: {', '.join(left_out)}.", file=sys.stderr, flush=True)
    if not planned:
        return None
    with stage("compiling the sampler"):
        name, program = compile_sampling(config, description, topology, planned)
    return {
        "method": planned[name].text,
        "left_out": left_out,
        "stepper": config.sampling.stepper,
        "num_steps": config.sampling.num_steps,
        "batch_size": program.images,
        "suggestions": [] if program.fits(topology) else suggest_sampling(config, description, topology, program),
    } | report(program, topology)


def suggest_sampling(
    config: Config, description: ModelDescription, topology: Topology, first: Program
) -> list[dict[str, Any]]:
    """The largest batch of samples that fits as the config splits parameters, and with all of them split, compiled.

    Args:
        config: the settings.
        description: the network.
        topology: the devices.
        first: the sampler of `config`, which does not fit.

    Returns:
        Settings and report of each layout whose parameters fit; where no batch does, those of the smallest that was
        tried.
    """
    methods = {name: method for name, method in make_methods(config).items() if not method.needs_estimator}
    limit, suggestions = memory_limit(topology), []
    split = split_over_all(config, len(topology.devices))
    for layout in (config,) if split == config else (config, split):
        mesh = make_mesh(layout.parallel, topology.devices)
        fixed = parameter_bytes(description, mesh)
        if limit is None or fixed > limit:
            continue

        def compile_batch(size: int, layout: Config = layout) -> Program:
            sampling = dataclasses.replace(layout.sampling, batch_size=size)
            smaller = dataclasses.replace(layout, sampling=sampling)
            with stage(f"trying to sample with batch {size}, fsdp {layout.parallel.fsdp}"):
                return compile_sampling(smaller, description, topology, methods)[1]

        size = first.images
        program = first if layout == config else compile_batch(size)
        if not program.fits(topology):
            unit = mesh.shape["data"] * mesh.shape["fsdp"]
            size, program = smaller_batch(compile_batch, size, unit, program, topology, fixed)
        suggestions.append(settings(layout) | {"batch_size": size} | report(program, topology))
    return suggestions
