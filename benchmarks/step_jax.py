"""The side of benchmarks/step.py that is this project: its real training step and its real sampler."""

from __future__ import annotations

import dataclasses
import functools
import runpy
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from step_variants import Size, Variant, median_seconds

from nag_jax import loading
from nag_jax.config import Config, from_config_dict
from nag_jax.denoiser import LatentSpace, Params
from nag_jax.diffusion import guidance
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import make_stepper
from nag_jax.jobs import experiment
from nag_jax.jobs.train import step_function
from nag_jax.models.dit import init_params, unstack_blocks
from nag_jax.parallel import batch_sharding, init_sharded, make_mesh, shard_batch
from nag_jax.training.optimizer import make_optimizer
from nag_jax.training.state import TrainState, init_state
from nag_jax.training.step import jit_train_step

ROOT = Path(__file__).resolve().parent.parent
GUIDED_CHANNELS = 3
GUIDANCES = {
    "plain": guidance.plain(),
    "cfg": guidance.cfg(1.5, channels=GUIDED_CHANNELS),
    "nag": guidance.nag(1.0),
    "cfg+nag": guidance.cfg(1.5, channels=GUIDED_CHANNELS) + guidance.nag(1.0),
}


def environment() -> dict[str, Any]:
    """What step_torch's `environment` is for the other side."""
    found = experiment.environment()
    del found["command"]  # a worker's; that of the whole run is written beside it
    return found


def device_kind() -> str:
    return jax.devices()[0].device_kind


def measured_flops(size: Size) -> float:
    """FLOP a second of one large matrix product of random numbers in the dtype of the computation."""
    shape = (size.matmul_size, size.matmul_size)
    a, b = (jax.random.normal(jax.random.key(seed), shape, size.dtype) for seed in range(2))
    matmul = jax.jit(jnp.matmul)
    count = 20

    def chain() -> None:
        jax.block_until_ready([matmul(a, b) for _ in range(count)])

    return count * 2 * size.matmul_size**3 / median_seconds(chain, repeats=3)


def measure(size: Size, variant: Variant) -> dict[str, Any]:
    return {"train": measure_training, "sample": measure_sampling}[variant.job](size, variant)


def make_config(size: Size, variant: Variant) -> Config:
    """The config of the paper's experiment on ImageNet, with the network of `size`."""
    config = from_config_dict(runpy.run_path(str(ROOT / "configs/imagenet256.py"))["get_config"]("sit_xl2,nag"))
    network = {"size": "", "depth": size.depth, "hidden_size": size.hidden_size, "num_heads": size.num_heads}
    model = dataclasses.replace(config.model, **network, dtype=size.dtype, remat="none")
    return dataclasses.replace(
        config, batch_size=variant.batch_size, model=dataclasses.replace(model, **variant.options)
    )


def describe(size: Size, config: Config) -> loading.ModelDescription:
    shape = (size.side, size.side, 4)
    return loading.describe(config, num_classes=size.num_classes, sample_shape=shape, latent=LatentSpace())


def random_params(description: loading.ModelDescription, key: jax.Array) -> Params:
    """Parameters that are random everywhere: products with the zeros in a fresh network's gates run faster on a GPU."""
    model = description.network()
    # Drawn in the stacked layout, whatever the network's is: a tenth of the draws, and of the time to compile them.
    shapes = jax.eval_shape(functools.partial(init_params, model.clone(scan_blocks=True)), key)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    draws = [0.02 * jax.random.normal(each, leaf.shape) for leaf, each in zip(leaves, keys, strict=True)]
    params = structure.unflatten(draws)
    return params if model.scan_blocks else unstack_blocks(params)


def measure_training(size: Size, variant: Variant) -> dict[str, Any]:
    config = make_config(size, variant)
    description = describe(size, config)
    mesh = make_mesh(config.parallel)
    optimizer = make_optimizer(config.optimizer, config.num_steps)

    def fresh(key: jax.Array) -> TrainState:
        return init_state(random_params(description, key), optimizer, tuple(config.ema))

    state, shardings = init_sharded(fresh, mesh, jax.random.key(0))
    rng = np.random.default_rng(0)
    host_batch = {
        "moments": rng.standard_normal((config.batch_size, size.side, size.side, 8)).astype(np.float16),
        "label": rng.integers(size.num_classes, size=config.batch_size).astype(np.int32),
    }
    batch, run_key = shard_batch(mesh, host_batch), jax.random.key(1)
    begin = time.perf_counter()
    step = jit_train_step(step_function(config, description), mesh, shardings, batch_sharding(mesh))
    compiled = step.lower(state, batch, run_key).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - begin

    metrics: Any = None

    def chain() -> None:
        nonlocal state, metrics
        for _ in range(size.steps):
            state, metrics = compiled(state, batch, run_key)
        jax.block_until_ready((state, metrics))

    seconds = median_seconds(chain, size.repeats) / size.steps
    return {
        "seconds_per_step": seconds,
        "images_per_second": config.batch_size / seconds,
        "compile_seconds": compile_seconds,
        "loss": float(metrics["loss"]),
        "compiler_memory_bytes": compiler_memory(compiled.memory_analysis()),
        "peak_bytes_of_the_process": peak_bytes(),
    }


def measure_sampling(size: Size, variant: Variant) -> dict[str, Any]:
    """Every guidance on the same noise: time of one row (one evaluation of all branches) and what it is to plain."""
    config = make_config(size, variant)
    description = describe(size, config)
    params = jax.jit(functools.partial(random_params, description))(jax.random.key(0))
    sampler = Sampler(
        description.denoiser(params),
        GUIDANCES,
        stepper=make_stepper(config.sampling.stepper),
        num_steps=size.steps,
    )
    labels = np.arange(variant.batch_size) % size.num_classes
    indices = np.arange(variant.batch_size, dtype=np.uint32)
    rows = sampler.evaluations_per_image["plain"]
    by_guidance: dict[str, Any] = {}
    for name in GUIDANCES:

        def chain(name: str = name) -> None:
            jax.block_until_ready(sampler(name, labels, seed=0, indices=indices).x)

        begin = time.perf_counter()
        chain()
        first_call = time.perf_counter() - begin
        seconds = median_seconds(chain, size.repeats)
        evaluations = sampler.evaluations_per_image[name]
        by_guidance[name] = {
            "seconds_per_row": seconds / rows,
            "evaluations_per_row": evaluations / rows,
            "first_call_seconds": first_call,
        }
    return {
        "compile_seconds": by_guidance["plain"]["first_call_seconds"] - rows * by_guidance["plain"]["seconds_per_row"],
        "guidances": by_guidance,
        "peak_bytes_of_the_process": peak_bytes(),
    }


def compiler_memory(analysis: Any) -> dict[str, int]:
    names = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    return {name.removesuffix("_size_in_bytes"): getattr(analysis, name) for name in names}


def peak_bytes() -> int | None:
    """The device memory's peak since the process began, which holds the variants before; None where unknown."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
