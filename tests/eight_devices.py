"""Run by test_parallel.py in a process with eight devices: trains a small DiT in every mode and prints what differed.

Output: one line of JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from nag_jax.autoencoder import made_up_autoencoder
from nag_jax.checkpoint import Checkpoints
from nag_jax.data.images import to_uint8
from nag_jax.data.sources import DataConfig
from nag_jax.denoiser import NetworkFunction, from_network
from nag_jax.diffusion.objective import Objective, draw
from nag_jax.diffusion.process import Linear
from nag_jax.jobs.decoding import Decoder
from nag_jax.models.dit import ModelConfig, build_model
from nag_jax.parallel import (
    ParallelConfig,
    batch_sharding,
    init_sharded,
    local_rows,
    make_mesh,
    on_mesh,
    on_own_rows_and_heads,
    param_shardings,
    pmap_sharding,
    replicated,
    shard_batch,
    split_batch,
)
from nag_jax.training.optimizer import OptimizerConfig, make_optimizer
from nag_jax.training.state import init_state
from nag_jax.training.step import batch_states, jit_train_step, make_train_step, pmap_train_step

SHAPE, ROWS, KEY = (8, 8, 1), 16, jax.random.key(5)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
OBJECTIVE = Objective(label_dropout=0.25, noise_dropout=0.25)
# A large eps keeps Adam from turning rounding errors of tiny gradients into whole steps.
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.05, eps=1e-2, clip_norm=1.0), 100)
# Unrolled, because an unfortunate sharding rule once went wrong there and not under a scan; and it compiles fastest.
SIZE = ModelConfig(depth=1, hidden_size=64, num_heads=2, patch_size=4, scan_blocks=False)
MODEL = build_model(SIZE, input_shape=SHAPE, num_classes=3)
DENOISER = from_network(NetworkFunction(MODEL), None, Linear(), num_classes=3, sample_shape=SHAPE)


def new_state(key):
    rows = (jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), jnp.zeros(1, bool))
    params = MODEL.init(key, *rows)["params"]
    # A fresh DiT answers zero; moved a little off its start, every layer has a gradient.
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(3.0 * jnp.arange(x.size)).reshape(x.shape), params)
    return init_state(moved, OPTIMIZER)


def batch_of(step):
    rng = np.random.default_rng((1, step))
    return {
        "image": rng.normal(size=(ROWS, *SHAPE)).astype(np.float32),
        "label": rng.integers(0, 3, ROWS).astype(np.int32),
    }


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def same_bits(one, other):
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in zip(*(jax.tree.leaves(on_host(tree)) for tree in (one, other)), strict=True)
    )


def largest_difference(one, other):
    return max(
        float(np.max(np.abs(a - b), initial=0.0))
        for a, b in zip(*(jax.tree.leaves(on_host(tree)) for tree in (one, other)), strict=True)
    )


class Mode:
    """One way of running the step: how states and batches are placed, and the compiled step."""

    def __init__(self, name, start):
        self.name = name
        axis = "devices" if name == "pmap" else None
        accumulation_steps = 2 if name == "data" else 1
        step = make_train_step(
            DENOISER, OBJECTIVE, OPTIMIZER, {"ema": 0.9}, axis_name=axis, accumulation_steps=accumulation_steps
        )
        if name in MESHES:
            data, fsdp, tensor = MESHES[name]
            self.mesh = make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor))
            if name == "all":
                self.state, self.shardings = init_sharded(new_state, self.mesh, KEY)
            else:
                self.shardings = param_shardings(self.mesh, start)
                self.state = jax.device_put(start, self.shardings)
            self.step = jit_train_step(step, self.mesh, self.shardings, batch_sharding(self.mesh))
            self.place = lambda batch: shard_batch(self.mesh, batch)
        else:
            sharding = pmap_sharding(axis) if axis else SingleDeviceSharding(jax.devices()[0])
            self.shardings = jax.tree.map(lambda _: sharding, start)
            self.state = jax.device_put(start, self.shardings)
            self.step = pmap_train_step(step, axis) if axis else jax.jit(step)
            self.place = split_batch if axis else (lambda batch: batch)

    def run(self, first, last):
        metrics = []
        for s in range(first, last):
            before = self.state
            self.state, values = self.step(before, self.place(batch_of(s)), KEY)
            self.is_donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            metrics.append(on_host(values))
        return metrics

    def restore(self, checkpoints):
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.state, self.shardings
        )
        self.state, _ = checkpoints.restore(abstract)


def own_rows_and_heads(mesh):
    """Shapes that a function sees of arrays of so many rows and heads, and whether its result is put together right."""
    seen = {}
    for rows, heads in ((8, 4), (3, 4), (8, 3)):

        def double(x, key=f"{rows} x {heads}"):
            seen[key] = list(x.shape)
            return 2 * x

        x = np.arange(rows * heads * 10.0).reshape(rows, 2, heads, 5)
        split = jax.jit(on_mesh(on_own_rows_and_heads(double), mesh))
        assert np.array_equal(split(jax.device_put(x, replicated(mesh))), 2 * x)
    return seen


def main(folder):
    report = {"devices": jax.device_count()}
    start = on_host(jax.jit(new_state)(KEY))
    modes = {name: Mode(name, start) for name in ("one", "data", "fsdp", "all", "pmap")}
    reference = modes["one"]
    report["init_difference"] = largest_difference(modes["all"].state, start)
    leaves = jax.tree.leaves(modes["fsdp"].state)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    report["fsdp_share_per_device"] = held / sum(leaf.size for leaf in leaves)

    metrics = {name: mode.run(0, 3) for name, mode in modes.items()}
    for key in ("loss", "grad_norm"):
        report[key] = {name: [float(m[key]) for m in values] for name, values in metrics.items()}
    report["donated"] = {name: mode.is_donated for name, mode in modes.items()}
    report["count"] = {
        name: all(
            np.array_equal(a["buckets"]["count"], b["buckets"]["count"])
            for a, b in zip(values, metrics["one"], strict=True)
        )
        for name, values in metrics.items()
    }
    report["params"] = {
        name: largest_difference(mode.state.params, reference.state.params) for name, mode in modes.items()
    }
    report["sharding_kept"] = all(
        jax.tree.leaves(
            jax.tree.map(
                lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim),
                modes["all"].state,
                modes["all"].shardings,
            )
        )
    )

    # A checkpoint of one mode goes on in every other.
    saved = on_host(modes["fsdp"].state)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(modes["fsdp"].state)
        # The saved state is donated at once: the save must hold what it was.
        modes["fsdp"].run(3, 4)
        checkpoints.wait()
        report["restored"], report["next_loss"] = {}, {}
        for name, mode in modes.items():
            mode.restore(checkpoints)
            report["restored"][name] = same_bits(mode.state, saved)
            report["next_loss"][name] = float(mode.run(3, 4)[0]["loss"])
        checkpoints.save(modes["pmap"].state)
        checkpoints.wait()
        from_pmap = on_host(modes["pmap"].state)
        modes["all"].restore(checkpoints)
        report["restored"]["from pmap to all"] = same_bits(modes["all"].state, from_pmap)

    mesh = modes["fsdp"].mesh
    compiled = jax.jit(
        lambda key, positions: draw(OBJECTIVE, Linear(), key, 3, positions, SHAPE), out_shardings=batch_sharding(mesh)
    )
    whole = jax.jit(lambda key, positions: draw(OBJECTIVE, Linear(), key, 3, positions, SHAPE))
    positions = jnp.arange(ROWS)
    report["same_draws"] = same_bits(compiled(jax.device_put(KEY, replicated(mesh)), positions), whole(KEY, positions))
    mesh = modes["all"].mesh
    vae = made_up_autoencoder()
    rng = np.random.default_rng(2)
    moments = rng.normal(size=(ROWS, 2, 2, 8)).astype(np.float16)
    draw_states = jax.jit(lambda moments: batch_states({"moments": moments}, vae.latent, KEY, 3))
    states = draw_states(moments)
    placed = draw_states(jax.device_put(moments, batch_sharding(mesh)))
    report["latent_difference"] = largest_difference(placed, states)
    decoder = Decoder(DataConfig(mock_examples=1), vae.latent, mesh, "network")
    expected = to_uint8(on_host(vae.decode(states[:13])))
    for name, images in (("decode_all", decoder.decode_all(on_host(states[:13]))), ("decode", decoder(placed)[:13])):
        report[name] = largest_difference(images.astype(np.float32), expected.astype(np.float32))
    report["own_rows_and_heads"] = own_rows_and_heads(modes["all"].mesh)
    mesh = modes["fsdp"].mesh
    report["local_rows"] = [local_rows(mesh, ROWS).start, local_rows(mesh, ROWS).stop]
    report["state_rules"] = (
        param_shardings(mesh, modes["fsdp"].state.params) == modes["fsdp"].shardings.ema["ema"]
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
