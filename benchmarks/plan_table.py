"""Plans DiT sizes for TPUs that are not here: memory, the largest batch that fits, communication, time at best.

    python benchmarks/plan_table.py            fills results/plan_tpu.json, cell by cell; hours on two cores
    python benchmarks/plan_table.py --table    prints what there is as the table of docs/plan.md

Needs the extra `plan`, and no TPU. A cell that is there is skipped, so the script goes on where it was stopped. Every
compilation is a process of its own and is ended after three minutes; a search of the batch makes at most six. Nothing
here is measured on a TPU: the memory is the compiler's, and times are a roofline.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from etils import epath

from nag_jax import storage
from nag_jax.config import Config, defaults, from_config_dict
from nag_jax.plan.search import Attempt, largest_fitting
from nag_jax.plan.topologies import CHIPS, GIB, topology_name

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "results/plan_tpu.json"
COMPILE_SECONDS = 180
MOST_COMPILATIONS = 6
METHOD = "cfg+nag"
SMALLEST_BATCH = 256  # of the public training
ROWS_OF_A_DEVICE = 4  # at least, on many devices


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        job: "training" or "sampling".
        size: of the network, patch 2 on latents of 32 x 32 x 4.
        machine: a name of `plan.topologies`.
        fsdp: devices that parameters are split over; the others are data-parallel.
    """

    job: str
    size: str
    machine: str
    fsdp: int

    @property
    def name(self) -> str:
        """Names the cell in the results."""
        return f"{self.job} {self.size}/2 {self.machine} fsdp {self.fsdp}"


# The most important first.
CELLS = (
    Cell("training", "XL", "v4-8", 4),
    Cell("training", "XL", "v5e-16", 16),
    Cell("training", "XL", "v5e-256", 16),
    Cell("training", "XL", "v6e-16", 1),
    Cell("training", "XL", "v6e-16", 16),
    Cell("sampling", "XL", "v5e-16", 1),
    Cell("sampling", "XL", "v4-8", 1),
    Cell("training", "B", "v5e-16", 1),
    Cell("training", "S", "v5e-16", 1),
    Cell("training", "L", "v5e-16", 16),
    Cell("sampling", "XL", "v5e-256", 1),
    Cell("sampling", "XL", "v6e-16", 1),
    Cell("training", "S", "v4-8", 1),
    Cell("training", "B", "v4-8", 1),
    Cell("training", "L", "v4-8", 4),
    Cell("sampling", "S", "v5e-16", 1),
    Cell("sampling", "B", "v5e-16", 1),
    Cell("sampling", "L", "v5e-16", 1),
    Cell("training", "XL", "v5p-8", 1),
    Cell("training", "XL", "tpu7x-8", 1),
    Cell("training", "S", "v5e-256", 1),
    Cell("training", "B", "v5e-256", 1),
    Cell("training", "L", "v5e-256", 16),
    Cell("training", "S", "v6e-16", 1),
    Cell("training", "B", "v6e-16", 1),
    Cell("training", "L", "v6e-16", 1),
    Cell("sampling", "S", "v4-8", 1),
    Cell("sampling", "B", "v4-8", 1),
    Cell("sampling", "L", "v4-8", 1),
)


def devices_of(machine: str) -> int:
    """The devices of a machine."""
    generation, _, shape = topology_name(machine).partition(":")
    chips = 1
    for side in shape.split("x"):
        chips *= int(side)
    return chips * CHIPS[generation].devices


def config_of(cell: Cell, batch_size: int) -> Config:
    """The settings of a cell: those of configs/imagenet256.py that decide memory and operations."""
    settings = defaults()
    settings.data.name = "imagenet2012"
    settings.data.image_size, settings.data.channels, settings.data.latents = 256, 3, "latents/imagenet256"
    settings.model.size, settings.model.patch_size = cell.size, 2
    settings.model.learn_sigma, settings.model.dtype, settings.model.remat = True, "bfloat16", "dots"
    settings.objective.label_dropout = settings.objective.noise_dropout = 0.1
    settings.sampling.stepper, settings.sampling.num_steps = "euler_maruyama", 250
    settings.sampling.guided_channels = 3
    settings.eval.methods, settings.eval.num_samples = (METHOD,), 10_000
    settings.parallel.fsdp = cell.fsdp
    settings.batch_size = settings.sampling.batch_size = batch_size
    return from_config_dict(settings)


def compile_here(cell: Cell, batch_size: int) -> dict[str, Any]:
    """Compiles one program in this process; its report."""
    from nag_jax.jobs import plan, plan_programs
    from nag_jax.jobs.methods import make_method
    from nag_jax.parallel import make_mesh

    config = config_of(cell, batch_size)
    topology, description = plan.open_plan(config, cell.machine)
    if cell.job == "sampling":
        methods = {METHOD: make_method(METHOD, config.sampling)}
        _, program = plan_programs.compile_sampling(config, description, topology, methods)
        return plan_programs.report(program, topology)
    mesh = make_mesh(config.parallel, topology.devices)
    state = plan_programs.state_bytes(config, description, mesh)
    return {"state_bytes": state} | plan_programs.report(
        plan_programs.compile_training(config, description, topology), topology
    )


def compile_apart(cell: Cell, batch_size: int) -> dict[str, Any]:
    """`compile_here` in a process of its own; {"error": why} where it fails or takes too long."""
    given = json.dumps({"cell": dataclasses.asdict(cell), "batch_size": batch_size})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, __file__, f"--compile={given}"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"batch {batch_size} took more than {COMPILE_SECONDS} s to compile"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def fill(cell: Cell) -> dict[str, Any]:
    """The content of a cell: one program, and for training the largest batch that fits."""
    devices = devices_of(cell.machine)
    batch_size = max(SMALLEST_BATCH if cell.job == "training" else 64, ROWS_OF_A_DEVICE * devices)
    first = compile_apart(cell, batch_size)
    content = dataclasses.asdict(cell) | {"devices": devices, "batch_size": batch_size} | first
    if "error" in first or cell.job == "sampling":
        return content
    known = {batch_size // devices: Attempt(first["fits"], first["needed_bytes"])}

    def attempt(rows: int) -> Attempt:
        result = compile_apart(cell, rows * devices)
        if "error" in result:
            raise RuntimeError(result["error"])
        return Attempt(result["fits"], result["needed_bytes"])

    chip = CHIPS[topology_name(cell.machine).partition(":")[0]].of_one_device()
    try:
        largest = largest_fitting(
            attempt, known, limit=chip.hbm_bytes, fixed_bytes=first["state_bytes"], max_attempts=MOST_COMPILATIONS
        )
    except RuntimeError as error:
        return content | {"largest_batch": {"error": str(error)}}
    too_large = None if largest.too_large is None else largest.too_large * devices
    found = {"fits": largest.fits * devices, "too_large": too_large, "compilations": len(known)}
    return content | {"largest_batch": found}


def table(content: dict[str, Any]) -> str:
    """The cells as a table of Markdown; those that were not compiled stand with the reason."""
    lines = [
        "| job | network | machine | fsdp | batch | memory, GiB | received, GiB | time, ms | lost | largest batch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in CELLS:
        found = content["cells"].get(cell.name)
        head = f"| {cell.job} | {cell.size}/2 | {cell.machine} | {cell.fsdp} |"
        if found is None:
            lines.append(f"{head} | | | | | not compiled yet |")
        elif "error" in found:
            lines.append(f"{head} {found['batch_size']} | | | | | {found['error']} |")
        else:
            lines.append(f"{head} {found['batch_size']} | {' | '.join(numbers(found))} |")
    return "\n".join(lines)


def numbers(found: dict[str, Any]) -> list[str]:
    """Memory, received, time, share lost and the largest batch of a cell."""
    largest = found.get("largest_batch", {"fits": None})
    if "error" in largest:
        batch = str(largest["error"])
    elif found["job"] == "sampling":
        batch = ""
    elif largest["too_large"] is None:
        batch = f"{largest['fits']} or more"
    else:
        batch = f"{largest['fits']} ({largest['too_large']} does not fit)"
    if "memory" not in found:
        asked = found["needed_bytes"]
        return ["does not fit" if asked is None else f"does not fit ({asked / GIB:.1f})", "", "", "", batch]
    line = found["roofline"]
    hidden, bare = line["communication_share"]
    return [
        f"{found['memory']['total'] / GIB:.2f}",
        f"{found['received_bytes'] / GIB:.2f}",
        f"{1e3 * line['seconds']:.1f} to {1e3 * line['seconds_without_overlap']:.1f}",
        f"{hidden:.0%} to {bare:.0%}",
        batch,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file that is filled")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and compile nothing")
    parser.add_argument("--cells", type=int, default=len(CELLS), help="stop after so many cells of the list")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        wanted = json.loads(given.compile)
        print(json.dumps(storage.as_json(compile_here(Cell(**wanted["cell"]), wanted["batch_size"]))))
        return
    content = storage.read_json(given.output) if given.output.exists() else {"cells": {}}
    if given.table:
        print(table(content))
        return
    from nag_jax.jobs.experiment import environment, version

    for cell in CELLS[: given.cells]:
        if cell.name in content["cells"]:
            continue
        start = time.perf_counter()
        filled = fill(cell)
        where = environment() | {"command": "python benchmarks/plan_table.py", "libtpu": version("libtpu")}
        content["cells"][cell.name] = filled | {"seconds": time.perf_counter() - start, "environment": where}
        storage.write_json(epath.Path(given.output), content)
        print(f"{cell.name}: {content['cells'][cell.name]['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
