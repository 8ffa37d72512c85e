"""Plans DiT sizes for TPUs that are not here: memory, the largest batch that fits, communication, time at best.

    python benchmarks/plan_table.py            fills results/plan_tpu.json, cell by cell; hours on two cores
    python benchmarks/plan_table.py --table    prints what there is as the table of docs/plan.md

Needs the extra `plan`, and no TPU. A cell that is there is skipped, so the script goes on where it was stopped, unless
the source of its programs has changed since (plan_source.py); --table names such cells on standard error. Every
compilation is a process of its own and is ended after three minutes; a search of the batch makes at most six. Nothing
here is measured on a TPU: the memory is the compiler's, and times are a roofline.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from plan_cells import NOT_COMPILED, ROOT, Cell, compile_apart, devices_of, run_script

from nag_jax.plan.search import Attempt, largest_fitting
from nag_jax.plan.topologies import CHIPS, GIB, topology_name

MOST_COMPILATIONS = 6
SMALLEST_BATCH = 256  # of the public training
ROWS_OF_A_DEVICE = 4  # at least, on many devices

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
    Cell("training", "3B", "v5e-16", 16),
    Cell("training", "3B", "v5p-16", 8),
)


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
    columns = ["job", "network", "machine", "fsdp", "batch", "memory, GiB", "received, GiB", "time, ms", "lost"]
    columns += ["largest batch", "commit"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for cell in CELLS:
        found = content["cells"].get(cell.name)
        head = f"| {cell.job} | {cell.size}/2 | {cell.machine} | {cell.fsdp} |"
        if found is None:
            lines.append(f"{head} | | | | | {NOT_COMPILED} | |")
        elif "error" in found:
            lines.append(f"{head} {found['batch_size']} | | | | | {found['error']} | {commit_of(found)} |")
        else:
            lines.append(f"{head} {found['batch_size']} | {' | '.join(numbers(found))} | {commit_of(found)} |")
    return "\n".join(lines)


def commit_of(found: dict[str, Any]) -> str:
    """The commit that a cell is of, in seven digits, with "+changes" where the source differed from it."""
    commit, _, changes = (found["environment"]["commit"] or "none").partition("+")
    return f"{commit[:7]}+{changes}" if changes else commit[:7]


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
        f"{found['needed_bytes'] / GIB:.2f}",
        f"{found['received_bytes'] / GIB:.2f}",
        f"{1e3 * line['seconds']:.1f} to {1e3 * line['seconds_without_overlap']:.1f}",
        f"{hidden:.0%} to {bare:.0%}",
        batch,
    ]


if __name__ == "__main__":
    run_script("plan_table.py", __doc__, CELLS, fill, table, ROOT / "results/plan_tpu.json")
