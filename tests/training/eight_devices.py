"""Run by test_compiled_steps.py in a process with eight devices: steps of scanned blocks on a 2 x 2 x 2 mesh.

Depth 2, rematerialised, in two micro-batches: one step and two together in float32, one in bfloat16, and beside them
what a lone device computes in float32. Output: one line of JSON.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from nag_jax.denoiser import NetworkFunction, from_network
from nag_jax.diffusion.objective import Objective
from nag_jax.diffusion.process import Linear
from nag_jax.models.dit import ModelConfig, build_model
from nag_jax.parallel import ParallelConfig, batch_sharding, make_mesh, param_shardings, shard_batch
from nag_jax.training.optimizer import OptimizerConfig, make_optimizer
from nag_jax.training.state import init_state
from nag_jax.training.step import jit_train_step, make_train_step, several_steps

SHAPE, ROWS, KEY = (8, 8, 1), 16, jax.random.key(5)
# By name: dtype, the mesh and the steps that run together.
PROGRAMS = {
    "one": ("float32", (1, 1, 1), 1),
    "all": ("float32", (2, 2, 2), 1),
    "together": ("float32", (2, 2, 2), 2),
    "bfloat16": ("bfloat16", (2, 2, 2), 1),
}
NUM_STEPS = 4
# A large eps keeps Adam from turning rounding errors of tiny gradients into whole steps.
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.05, eps=1e-2, clip_norm=1.0), 100)
OBJECTIVE = Objective(label_dropout=0.25, noise_dropout=0.25)


def new_state(model):
    rows = (jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), jnp.zeros(1, bool))
    params = model.init(KEY, *rows)["params"]
    # A fresh DiT answers zero; moved a little off its start, every layer has a gradient.
    return init_state(
        jax.tree.map(lambda x: x + 0.05 * jnp.sin(3.0 * jnp.arange(x.size)).reshape(x.shape), params), OPTIMIZER
    )


def batch_of(step):
    rng = np.random.default_rng((1, step))
    return {
        "image": rng.normal(size=(ROWS, *SHAPE)).astype(np.float32),
        "label": rng.integers(0, 3, ROWS).astype(np.int32),
    }


def host_work(text):
    """Whatever a compiled program has that may talk to the host: custom calls by their target, and transfers."""
    calls = re.findall(r'custom_call_target="([^"]*)"', text)
    return calls + re.findall(r"\b(infeed|outfeed|send|recv|is_host_transfer=true)\b", text)


def compiled_step(dtype, axes, together):
    """The compiled step, its mesh, and the state that it starts from."""
    size = ModelConfig(depth=2, hidden_size=64, num_heads=2, patch_size=4, scan_blocks=True, remat="dots", dtype=dtype)
    model = build_model(size, input_shape=SHAPE, num_classes=3)
    denoiser = from_network(NetworkFunction(model), None, Linear(), num_classes=3, sample_shape=SHAPE)
    step = make_train_step(denoiser, OBJECTIVE, OPTIMIZER, {"ema": 0.9}, accumulation_steps=2)
    data, fsdp, tensor = axes
    mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])
    state = jax.jit(new_state, static_argnums=0)(model)
    shardings = param_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    jitted = jit_train_step(step if together == 1 else several_steps(step), mesh, shardings, batch_sharding(mesh))
    return jitted.lower(state, batches(mesh, 0, together), KEY).compile(), mesh, state


def batches(mesh, first, together):
    placed = tuple(shard_batch(mesh, batch_of(step)) for step in range(first, first + together))
    return placed if together > 1 else placed[0]


def shard_bytes(state):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


def train(dtype, axes, together):
    """What the program is made of and computes in NUM_STEPS steps, and the parameters after them."""
    program, mesh, state = compiled_step(dtype, axes, together)
    report = {
        "host_work": host_work(program.as_text()),
        "state_bytes": shard_bytes(state),
        "alias_bytes": program.memory_analysis().alias_size_in_bytes,
        "loss": [],
        "grad_norm": [],
        "donated": True,
    }
    for first in range(0, NUM_STEPS, together):
        before = state
        state, metrics = program(state, batches(mesh, first, together), KEY)
        report["donated"] &= all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        for name in ("loss", "grad_norm"):
            report[name] += np.atleast_1d(metrics[name]).tolist()
    params = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])
    return report, params


def a_call_to_the_host():
    """What `host_work` finds in a step that prints."""

    def step(x):
        jax.debug.callback(print, x)
        return x + 1

    return host_work(jax.jit(step).lower(1.0).compile().as_text())


def main():
    report, params = {"a_call_to_the_host": a_call_to_the_host()}, {}
    for name, program in PROGRAMS.items():
        report[name], params[name] = train(*program)
        report[name]["params_difference"] = float(np.abs(params[name] - params["one"]).max())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
