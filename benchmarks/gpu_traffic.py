"""Bytes that the kernels of an H100's training step read and write, by the program that XLA compiles for one.

    pip install "jax-cuda12-plugin==$(python -c 'import jax; print(jax.__version__)')" \
        "jax-cuda12-pjrt==$(python -c 'import jax; print(jax.__version__)')" \
        nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-cublas-cu12 nvidia-cudnn-cu12 nvidia-cufft-cu12 \
        nvidia-cusolver-cu12 nvidia-cusparse-cu12 nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12 nvidia-nccl-cu12
    python benchmarks/gpu_traffic.py

Needs no GPU; the packages are for Linux. Nothing is measured: every kernel is taken to read its operands and to write
its results once, in a program that is compiled without a GPU's autotuning and with products by cuBLAS. A GPU may run
another one. Products and attention have their least; what other kernels move is what can be saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import step_jax
from etils import epath
from jax.experimental import topologies
from step_variants import NO_TRITON_PRODUCTS, SIZES, Variant

from nag_jax import storage
from nag_jax.jobs.experiment import environment, version
from nag_jax.jobs.plan_programs import lower_training
from nag_jax.plan.hlo import Computation, Instruction, Program, parse, shape_bytes
from nag_jax.plan.topologies import Topology

OUTPUT = Path(__file__).resolve().parent.parent / "results/gpu_traffic.json"
BATCH_SIZE = 128
DEPTHS = (2, 4)  # a block is half of what the deeper network has more
LAYOUTS = (
    {"scan_blocks": True, "remat": "dots_flash"},
    {"scan_blocks": False, "remat": "dots_flash"},
    {"scan_blocks": False, "remat": "none"},
)
# What XLA asks a driver for; published by NVIDIA but for the runtime's version.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# They name memory that is there already.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "iota")


def kernel_bytes(program: Program, computation: str) -> Counter[str]:
    """Bytes that one run of a computation moves, by the kind of the kernel: "products", "attention" or "other"."""
    instructions = program.computations[computation]
    moved: Counter[str] = Counter()
    for each in instructions.values():
        if each.opcode in FREE or each.opcode.endswith("-done"):
            continue
        if each.opcode == "while":
            body = kernel_bytes(program, each.attribute("body") or "")
            moved.update({kind: program.trip_count(each) * count for kind, count in body.items()})
        elif each.opcode == "call":
            moved.update(kernel_bytes(program, each.attribute("to_apply") or ""))
        elif each.opcode == "fusion":
            moved["other"] += fusion_bytes(program.computations[each.attribute("calls") or ""])
        else:
            operands = sum(shape_bytes(instructions[name].shape) for name in each.operands)
            moved[kind_of(each)] += operands + shape_bytes(each.shape)
    return moved


def kind_of(instruction: Instruction) -> str:
    if "__cublas" in instruction.rest:
        return "products"
    return "attention" if "__cudnn$fmha" in instruction.rest else "other"


def fusion_bytes(fused: Computation) -> int:
    """Bytes that a kernel of several operations moves: of what it only slices, the slice; so with what it updates."""
    read = sum(
        min(shape_bytes(each.shape), bytes_read(fused, each)) for each in fused.values() if each.opcode == "parameter"
    )
    root = next(each for each in fused.values() if each.is_root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(bytes_written(fused, each) for each in results)


def bytes_read(fused: Computation, array: Instruction) -> int:
    """Bytes of `array` that the operations which take it read."""
    total = 0
    for user in fused.values():
        if array.name not in user.operands:
            continue
        if user.opcode in ("slice", "dynamic-slice", "gather"):
            total += shape_bytes(user.shape)
        elif user.opcode == "bitcast" and not user.is_root:
            total += bytes_read(fused, user)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != array.name:
            total += shape_bytes(array.shape)
    return total


def bytes_written(fused: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return shape_bytes(fused[result.operands[1]].shape)
    return shape_bytes(result.shape)


def compile_step(depth: int, options: dict[str, Any]) -> Any:
    """The training step of benchmarks/step.py with so many blocks, compiled for an H100."""
    size = dataclasses.replace(SIZES["full"], depth=depth)
    config = step_jax.make_config(size, Variant("jax", "train", BATCH_SIZE, {"attention": "cudnn", **options}))
    description = step_jax.describe(size, config)
    devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
    return lower_training(config, description, Topology("h100", tuple(devices), None)).compile()


def traffic_of(options: dict[str, Any]) -> dict[str, Any]:
    """Gigabytes that one block moves in a step, its share of the optimizer included, by kind; and its memory."""
    moved, memory = [], []
    for depth in DEPTHS:
        compiled = compile_step(depth, options)
        program = parse(compiled.as_text())
        moved.append(kernel_bytes(program, program.entry))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    blocks = DEPTHS[1] - DEPTHS[0]
    kinds = {kind: (moved[1][kind] - moved[0][kind]) / blocks / 1e9 for kind in sorted(moved[1])}
    return {"gigabytes_of_a_block": kinds, "temporary_gigabytes_of_a_block": (memory[1] - memory[0]) / blocks / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file; this run is added to those in it")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the GPU's compiler is asked by name
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + NO_TRITON_PRODUCTS
    layouts = []
    for options in LAYOUTS:
        start = time.perf_counter()
        layouts.append({**options, **traffic_of(options), "seconds": time.perf_counter() - start})
        print(layouts[-1], flush=True)
    packages = {name: version(name) for name in ("jax-cuda12-plugin", "nvidia-cudnn-cu12", "nvidia-cublas-cu12")}
    run = {
        "network": "XL/2 of benchmarks/step.py, bfloat16, cuDNN attention",
        "batch_size": BATCH_SIZE,
        "layouts": layouts,
        "environment": environment() | {"command": "python benchmarks/gpu_traffic.py", **packages},
    }
    runs = storage.read_json(given.output)["runs"] if given.output.exists() else []
    storage.write_json(epath.Path(given.output), {"runs": [*runs, run]})


if __name__ == "__main__":
    main()
