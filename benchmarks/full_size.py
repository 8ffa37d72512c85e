"""Converts, loads, runs and exports networks of the published sizes, with random weights: times and peak memory.

    python benchmarks/full_size.py            writes results/full_size.json; some minutes and 15 GB of disk

The published files were not at hand, so files of exactly their layout are made: an official DiT-XL/2 state dict of
675 M parameters, and diffusers' AutoencoderKL at the size of Stable Diffusion. Every stage is a process of its own, so
that its peak memory is its own; a stage fails the run where what comes back is not bit for bit what went in.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import nag_jax
from nag_jax import storage
from nag_jax.autoencoder import read_autoencoder
from nag_jax.convert import tables, torch_file
from nag_jax.convert.__main__ import main as convert
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.jobs.experiment import environment
from nag_jax.loading import ModelDescription
from nag_jax.models.dit import ModelConfig
from nag_jax.models.layers import sincos_positions
from nag_jax.models.vae import VaeConfig
from nag_jax.models.vae_table import to_torch_state_dict, vae_table

GIB = 2**30
LARGEST_PEAK_GIB = 20.0
SIZES = {
    # size: (network, side of a latent, autoencoder, side of an image)
    "full": (ModelConfig(size="XL", patch_size=2, learn_sigma=True), 32, VaeConfig(), 256),
    "tiny": (
        ModelConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, learn_sigma=True),
        8,
        VaeConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
        32,
    ),
}


def describe(size: str) -> ModelDescription:
    model, side, _, _ = SIZES[size]
    return ModelDescription(
        model, ProcessConfig("ddpm"), 1000, (side, side, 4), "1000 t - 1", "noise", has_null_noise=False
    )


def make_network(folder: Path, size: str) -> dict[str, Any]:
    """An official state dict of random numbers."""
    description = describe(size)
    grid = description.sample_shape[0] // description.model.patch_size
    rng = np.random.default_rng(0)
    tensors = {}
    shapes = tables.official_shapes(description)
    for name in sorted(shapes, key=lambda name: name.startswith("final_layer.")):  # last, as in the official file
        shape = shapes[name]
        tensors[name] = 0.02 * rng.standard_normal(shape, np.float32)
    tensors[tables.POSITIONS] = sincos_positions(grid, grid, tensors[tables.POSITIONS].shape[2])[None]
    torch_file.write_state_dict(folder / "DiT-random.pt", tensors)
    return {
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "file_gib": (folder / "DiT-random.pt").stat().st_size / GIB,
    }


def convert_network(folder: Path, size: str) -> dict[str, Any]:
    heads = [] if SIZES[size][0].size else [f"--num_heads={SIZES[size][0].num_heads}"]
    check(convert([str(folder / "DiT-random.pt"), str(folder / "dit"), *heads]) == 0, "conversion failed")
    return {}


def load_and_run(folder: Path, size: str) -> dict[str, Any]:
    denoiser = nag_jax.load(folder / "dit")
    params = jax.tree.map(jnp.asarray, denoiser.params)
    x = jax.random.normal(jax.random.key(0), (1, *denoiser.sample_shape))
    forward = jax.jit(lambda params, x: denoiser(params, x, jnp.float32(0.5), jnp.zeros(1, jnp.int32)))
    start = time.perf_counter()
    answer = jax.block_until_ready(forward(params, x))
    compiled = time.perf_counter()
    jax.block_until_ready(forward(params, x))
    check(bool(jnp.isfinite(answer.value).all() & (jnp.abs(answer.value) > 0).any()), "the answer is not finite")
    return {"first_call_s": compiled - start, "second_call_s": time.perf_counter() - compiled}


def export_network(folder: Path, size: str) -> dict[str, Any]:
    check(convert([str(folder / "dit"), str(folder / "back.pt"), "--to=dit"]) == 0, "export failed")
    return {}


def compare_files(folder: Path, size: str) -> dict[str, Any]:
    before, after = (folder / name for name in ("DiT-random.pt", "back.pt"))
    with before.open("rb") as one, after.open("rb") as other:
        while block := one.read(2**24):
            check(block == other.read(len(block)), "the exported file differs from the first one")
        check(not other.read(1), "the exported file is longer than the first one")
    return {"bit_identical": True}


def make_vae(folder: Path, size: str) -> dict[str, Any]:
    """A folder as diffusers writes it, of random numbers."""
    config = SIZES[size][2]
    rng = np.random.default_rng(0)
    tensors = {
        name: 0.05 * rng.standard_normal(entry.shape, np.float32) for name, entry in vae_table(config).items()
    }
    (folder / "sd-vae-random").mkdir()
    safetensors.numpy.save_file(tensors, folder / "sd-vae-random" / "diffusion_pytorch_model.safetensors")
    blocks = len(config.block_out_channels)
    content = {
        "_class_name": "AutoencoderKL",
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "act_fn": "silu",
        "scaling_factor": config.scaling_factor,
    }
    (folder / "sd-vae-random" / "config.json").write_text(json.dumps(content))
    return {"parameters": sum(tensor.size for tensor in tensors.values())}


def convert_vae(folder: Path, size: str) -> dict[str, Any]:
    check(convert([str(folder / "sd-vae-random"), str(folder / "vae"), "--name=random"]) == 0, "conversion failed")
    return {}


def encode_and_decode(folder: Path, size: str) -> dict[str, Any]:
    autoencoder, side = read_autoencoder(folder / "vae"), SIZES[size][3]
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)), jnp.float32)
    mean, _ = jax.block_until_ready(autoencoder.encode(image))
    start = time.perf_counter()
    jax.block_until_ready(autoencoder.encode(image))
    encoded = time.perf_counter()
    latent = mean * autoencoder.description.config.scaling_factor
    decoded = jax.block_until_ready(autoencoder.decode(latent))
    check(decoded.shape == image.shape and bool(jnp.isfinite(decoded).all()), "the decoded image is not finite")
    compiled = time.perf_counter()
    jax.block_until_ready(autoencoder.decode(latent))
    return {"encode_s": encoded - start, "decode_s": time.perf_counter() - compiled}


def compare_vae(folder: Path, size: str) -> dict[str, Any]:
    autoencoder = read_autoencoder(folder / "vae")
    back = to_torch_state_dict(autoencoder.params, autoencoder.description.config)
    first = safetensors.numpy.load_file(folder / "sd-vae-random" / "diffusion_pytorch_model.safetensors")
    check(back.keys() == first.keys(), "names differ")
    check(all(np.array_equal(back[name], first[name]) for name in first), "tensors differ")
    return {"bit_identical": True}


def check(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"error: {message}")


STAGES: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        make_network,
        convert_network,
        load_and_run,
        export_network,
        compare_files,
        make_vae,
        convert_vae,
        encode_and_decode,
        compare_vae,
    )
}


def run_stage(stage: str, folder: Path, size: str) -> dict[str, Any]:
    """Runs one stage in a process of its own; its numbers, wall time and peak memory."""
    command = [sys.executable, __file__, f"--stage={stage}", f"--folder={folder}", f"--size={size}"]
    environment_variables = {**os.environ, "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment_variables)
    if done.returncode:
        raise SystemExit(f"error: stage {stage} failed")
    return {"wall_s": time.perf_counter() - start} | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny tries the script itself")
    parser.add_argument("--output", default="results/full_size.json", help="file to write")
    parser.add_argument("--folder", help="where the networks are written; a temporary folder if not given")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        numbers = STAGES[given.stage](Path(given.folder), given.size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        print(json.dumps(numbers | {"peak_gib": peak}))
        return
    stages = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for stage in STAGES:
            stages[stage] = run_stage(stage, Path(folder), given.size)
            print(stage, stages[stage], file=sys.stderr, flush=True)
    largest = max(stage["peak_gib"] for stage in stages.values())
    where = environment() | {"command": f"python benchmarks/full_size.py --size={given.size}", "cores": os.cpu_count()}
    storage.write_json(given.output, {"size": given.size, "environment": where, "stages": stages, "peak_gib": largest})
    check(largest <= LARGEST_PEAK_GIB, f"the largest peak is {largest:.1f} GiB, above {LARGEST_PEAK_GIB:g}")


if __name__ == "__main__":
    main()
