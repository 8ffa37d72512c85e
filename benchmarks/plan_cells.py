"""What the tables of plans have in common: a cell, its settings, its compilation in a process of its own, its file.

    python benchmarks/plan_cells.py '{"cell": {…}, "batch_size": 256}'    compiles one program and prints its report

Which cells there are and what is searched or shown of them is plan_table.py's and memory_table.py's affair. Needs the
extra `plan`, and no TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from plan_source import program_digest

from nag_jax import storage
from nag_jax.config import Config, defaults, from_config_dict
from nag_jax.plan.topologies import CHIPS, topology_name

ROOT = Path(__file__).resolve().parent.parent
COMPILE_SECONDS = 180
METHOD = "cfg+nag"
NOT_COMPILED = "not compiled yet"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A program to compile.

    Attributes:
        job: "training" or "sampling".
        size: of the network, patch 2 on latents of 32 x 32 x 4.
        machine: a name of `plan.topologies`.
        fsdp: devices that parameters are split over; the others are data-parallel.
        tensor: devices that wide layers are split over besides.
    """

    job: str
    size: str
    machine: str
    fsdp: int
    tensor: int = 1

    @property
    def name(self) -> str:
        """Names the cell in the results."""
        tensor = f" tensor {self.tensor}" if self.tensor > 1 else ""
        return f"{self.job} {self.size}/2 {self.machine} fsdp {self.fsdp}{tensor}"


def devices_of(machine: str) -> int:
    """The devices of a machine."""
    generation, _, shape = topology_name(machine).partition(":")
    return math.prod(map(int, shape.split("x"))) * CHIPS[generation].devices


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
    settings.parallel.fsdp, settings.parallel.tensor = cell.fsdp, cell.tensor
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
            [sys.executable, __file__, given], capture_output=True, text=True, env=environment, timeout=COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"batch {batch_size} took more than {COMPILE_SECONDS} s to compile"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def digest_of(cell: Cell) -> str:
    """The digest of the source and the settings of a cell's programs; batches are the cell's own affair."""
    return program_digest(config_of(cell, devices_of(cell.machine)))


def is_current(cell: Cell, content: dict[str, Any]) -> bool:
    """Whether a cell is there and is of this source; those of before digests were kept are not."""
    return cell.name in content["cells"] and content["cells"][cell.name].get("digest") == digest_of(cell)


def run_script(
    script: str,
    description: str | None,
    cells: Sequence[Cell],
    fill: Callable[[Cell], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    output: Path,
) -> None:
    """The command line of a table: fills its file cell by cell, or prints what there is.

    Args:
        script: file name in benchmarks/, for the results.
        description: the help.
        cells: in the order in which they are filled; one that is there is skipped, unless it is of other source.
        fill: makes the content of a cell.
        table: makes the text of a file's content.
        output: the file, unless another is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=output, help="JSON file that is filled")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and compile nothing")
    parser.add_argument("--cells", type=int, default=len(cells), help="stop after so many cells of the list")
    given = parser.parse_args()
    content = storage.read_json(given.output) if given.output.exists() else {"cells": {}}
    if given.table:
        print(table(content))
        there = [cell for cell in cells if cell.name in content["cells"]]
        if outdated := [cell.name for cell in there if not is_current(cell, content)]:
            print(f"Of other source than this, so {script} compiles anew: {', '.join(outdated)}.", file=sys.stderr)
        return
    import jax

    from nag_jax.jobs.experiment import environment, version

    jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU where its compiler is installed
    for cell in cells[: given.cells]:
        if is_current(cell, content):
            continue
        start = time.perf_counter()
        filled = fill(cell)
        where = environment() | {"command": f"python benchmarks/{script}", "libtpu": version("libtpu")}
        about = {"digest": digest_of(cell), "seconds": time.perf_counter() - start, "environment": where}
        content["cells"][cell.name] = filled | about
        storage.write_json(epath.Path(given.output), content)
        print(f"{cell.name}: {content['cells'][cell.name]['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(storage.as_json(compile_here(Cell(**wanted["cell"]), wanted["batch_size"]))))
