"""Does the memory of a device fall as parameters are split? Theory beside the TPU compiler's own figures.

    python benchmarks/memory_table.py            fills results/memory_tpu.json, cell by cell; about an hour on two cores
    python benchmarks/memory_table.py --table    prints what there is as the table of docs/plan.md

Needs the extra `plan`, and no TPU. One training step is compiled for each network and mesh of sixteen chips, at the
same batch everywhere. What the theory counts is the training state; temporaries are the compiler's alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from plan_cells import NOT_COMPILED, ROOT, Cell, compile_apart, devices_of, run_script

from nag_jax.models.dit import SIZES
from nag_jax.plan.topologies import GIB

BATCH_SIZE = 256
COPIES = 4  # parameters, two moments of Adam, one average
FLOAT32 = 4
LATENT, PATCH_SIZE, CLASSES, TIME_FEATURES = (32, 32, 4), 2, 1000, 256
MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 2), (4, 2))  # fsdp and tensor; the rest is data
CELLS = tuple(
    Cell("training", size, machine, fsdp, tensor)
    for machine in ("v5p-32", "v5e-16")
    for size in ("XL", "3B")
    for fsdp, tensor in MESHES
)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many parameters a DiT has.

    Attributes:
        wide: in the kernels that the tensor axis splits: qkv, proj, fc1 and fc2 of every block.
        others: in all else.
    """

    wide: int
    others: int


def count_parameters(size: str) -> Parameters:
    """Counts the parameters of a DiT with a learned variance and a null noise embedding, by its layers.

    Of a block with D features: kernels of 3 + 1 + 4 + 4 squares of D, a modulation of six outputs, and the biases.
    """
    depth, features, _ = SIZES[size]
    square = features * features
    biases = (3 + 1 + 4 + 1) * features
    modulation = 6 * (square + features)
    patch = PATCH_SIZE * PATCH_SIZE * LATENT[2]
    of_patches = (patch + 1) * features
    of_time = (TIME_FEATURES + 1) * features + square + features
    of_conditions = (CLASSES + 1) * features + features  # with no class, and no time
    embedders = of_patches + of_time + of_conditions
    final = 2 * (square + features) + (features + 1) * 2 * patch
    return Parameters(wide=depth * 12 * square, others=depth * (biases + modulation) + embedders + final)


def state_by_theory(size: str, fsdp: int, tensor: int) -> float:
    """Bytes of the training state on a device if every parameter were split: 16 a parameter over fsdp x tensor or fsdp.

    Args:
        size: of the network.
        fsdp: devices along that axis, which splits all.
        tensor: devices along that axis, which splits the wide kernels.
    """
    parameters = count_parameters(size)
    return COPIES * FLOAT32 * (parameters.wide / tensor + parameters.others) / fsdp


def fill(cell: Cell) -> dict[str, Any]:
    """The content of a cell."""
    devices = devices_of(cell.machine)
    about = {"devices": devices, "batch_size": BATCH_SIZE}
    return dataclasses.asdict(cell) | about | compile_apart(cell, BATCH_SIZE)


def table(content: dict[str, Any]) -> str:
    """The cells as a table of Markdown; those that were not compiled stand with the reason."""
    lines = [
        "| network | machine | data x fsdp x tensor | state by theory | arguments | more by | temporaries | at once |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in CELLS:
        found = content["cells"].get(cell.name, {"error": NOT_COMPILED})
        data = devices_of(cell.machine) // (cell.fsdp * cell.tensor)
        theory = state_by_theory(cell.size, cell.fsdp, cell.tensor)
        head = f"| {cell.size}/2 | {cell.machine} | {data}x{cell.fsdp}x{cell.tensor} | {theory / GIB:.2f} |"
        lines.append(f"{head} {' | '.join(numbers(found, theory))} |")
    return "\n".join(lines)


def numbers(found: dict[str, Any], theory: float) -> list[str]:
    """Arguments, their difference from theory, temporaries, and what a cell needs at once."""
    if "error" in found:
        return ["", "", "", str(found["error"])]
    if "memory" not in found:
        asked = found["needed_bytes"]
        return ["", "", "", "does not fit" if asked is None else f"does not fit ({asked / GIB:.1f})"]
    memory = found["memory"]
    return [
        f"{memory['arguments'] / GIB:.2f}",
        f"{memory['arguments'] / theory - 1:.2%}",
        f"{memory['temporaries'] / GIB:.2f}",
        f"{memory['peak'] / GIB:.2f}",
    ]


if __name__ == "__main__":
    run_script("memory_table.py", __doc__, CELLS, fill, table, ROOT / "results/memory_tpu.json")
