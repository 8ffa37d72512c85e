"""Run by test_accumulate.py in a process with eight devices: metrics on split rows beside one device and numpy.

Output: one line of JSON.
"""

import json

import jax
import numpy as np

from nag_jax.errors import UserError
from nag_jax.metrics.accumulate import add_block, moments_in_blocks, start
from nag_jax.metrics.blocks import split_rows
from nag_jax.metrics.manifold import density_coverage, manifold, precision_recall
from nag_jax.parallel import ParallelConfig, make_mesh

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def all_of(samples, reference, mesh):
    balls = [manifold(x, mesh=mesh) for x in (samples, reference)]
    numbers = (precision_recall(*balls, mesh=mesh), density_coverage(samples, balls[1], mesh=mesh))
    return [ball.squared_radii.tolist() for ball in balls], numbers


def main():
    rng = np.random.default_rng(0)
    x = (rng.exponential(size=(150, 20)) + 5.0).astype(np.float32)
    y = (rng.exponential(size=(90, 20)) * 1.1 + 5.0).astype(np.float32)
    exact = x.astype(np.float64)
    report = {"devices": jax.device_count(), "moments_within_bound": {}, "manifold_equals_one_device": {}}
    meshes = {
        name: make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor))
        for name, (data, fsdp, tensor) in MESHES.items()
    }
    one_device = all_of(y, x, None)
    for name, mesh in meshes.items():
        state = moments_in_blocks(x, block_rows=64, mesh=mesh)
        spread = ((exact - state.shift) ** 2).mean(axis=0)
        allowed = 72 * 2.0**-21 * np.sqrt(np.outer(spread, spread))
        difference = np.abs(state.moments().covariance - np.cov(exact, rowvar=False))
        report["moments_within_bound"][name] = bool((difference <= allowed).all()) and state.count == 150
        if name != "fsdp":
            report["manifold_equals_one_device"][name] = all_of(y, x, mesh) == one_device
    placed = split_rows(x[:64], meshes["data"])
    report["rows_are_split"] = placed.addressable_shards[0].data.shape == (8, 20)
    # An array that already lies there is taken as it is.
    state = add_block(start(x.mean(axis=0)), placed, np.ones(64, bool), meshes["data"])
    report["rows_are_split"] &= bool(np.allclose(state.mean, exact[:64].mean(axis=0), rtol=1e-6))
    try:
        add_block(start(np.zeros(20)), x[:12], np.ones(12, bool), meshes["data"])
    except UserError as error:
        report["refused"] = str(error)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
