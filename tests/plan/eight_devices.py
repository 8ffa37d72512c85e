"""Run by test_collectives.py in a process with eight devices: what programs of known communication exchange.

Output: one line of JSON.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nag_jax.config import Config, SamplingConfig
from nag_jax.data.sources import DataConfig
from nag_jax.diffusion.objective import Objective
from nag_jax.jobs.methods import make_method
from nag_jax.jobs.plan_programs import compile_sampling, compile_training, state_bytes, training_batch
from nag_jax.jobs.train import fresh_state
from nag_jax.loading import describe
from nag_jax.models.dit import ModelConfig
from nag_jax.parallel import ParallelConfig, make_mesh, param_shardings
from nag_jax.plan.collectives import find_collectives, summarize
from nag_jax.plan.topologies import open_topology

CONFIG = Config(
    batch_size=16,
    data=DataConfig(image_size=8),
    model=ModelConfig(depth=2, hidden_size=128, num_heads=2, patch_size=2),
    objective=Objective(label_dropout=0.1, noise_dropout=0.1),
    sampling=SamplingConfig(num_steps=3, batch_size=16),
)


def exchanged(function, *arguments):
    return summarize(find_collectives(jax.jit(function).lower(*arguments).compile().as_text()))


def split(config, **axes):
    return dataclasses.replace(config, parallel=ParallelConfig(**axes))


def main():
    local = open_topology("local")
    mesh = make_mesh(ParallelConfig(fsdp=8))
    columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    report = {}
    parameter = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=columns)
    report["gather"] = exchanged(lambda x: jax.lax.with_sharding_constraint(2.0 * x, whole), parameter)

    def scan(rows, weights):
        # The sum over the split rows is one all-reduce of [32] in each of five rounds.
        def advance(carry, weight):
            return carry + jax.lax.with_sharding_constraint((rows * jnp.sin(carry * weight)).sum(axis=0), whole), None

        return jax.lax.scan(advance, jnp.zeros(32), weights)[0]

    rows = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    report["scan"] = exchanged(scan, rows, jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole))

    description = describe(CONFIG, num_classes=3, sample_shape=(8, 8, 1))
    state = jax.eval_shape(lambda: fresh_state(CONFIG, description, jax.random.key(0)))
    report["parameter_bytes"] = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    report["state_bytes"] = {
        size: state_bytes(CONFIG, description, make_mesh(ParallelConfig(fsdp=size))) for size in (1, 2, 4, 8)
    }
    specs = jax.tree.map(lambda place: place.spec, param_shardings(mesh, state))
    report["small_state_bytes"] = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True)
        if "fsdp" not in tuple(spec)
    )
    report["state_bytes_tensor"] = {
        size: state_bytes(CONFIG, description, make_mesh(ParallelConfig(fsdp=2, tensor=size))) for size in (1, 2, 4)
    }
    larger = dataclasses.replace(CONFIG, batch_size=64)
    programs = {
        "data": compile_training(CONFIG, description, local),
        "data_two_steps": compile_training(split(CONFIG, steps_per_dispatch=2), description, local),
        "fsdp": compile_training(split(CONFIG, fsdp=8), description, local),
        "fsdp_large_batch": compile_training(split(larger, fsdp=8), description, local),
        "all": compile_training(split(CONFIG, fsdp=2, tensor=2), description, local),
    }
    report |= {name: summarize(program.collectives) for name, program in programs.items()}
    report["arguments"] = {name: program.memory.arguments for name, program in programs.items()}
    report["flops"] = {name: program.flops for name, program in programs.items()}
    report["moved_bytes"] = {name: program.moved_bytes for name, program in programs.items()}
    methods = {"cfg+nag": make_method("cfg+nag", CONFIG.sampling)}
    _, sampler = compile_sampling(CONFIG, description, local, methods)
    report["sampling"] = summarize(sampler.collectives)
    batch = training_batch(CONFIG, description)
    report["batch_bytes"] = sum(math.prod(each.shape) * each.dtype.itemsize for each in batch.values())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
