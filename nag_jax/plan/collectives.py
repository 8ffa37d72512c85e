"""The collectives of a compiled program, read from its text (HLO): kind, bytes and how often they run.

A loop's body counts as often as the loop runs. Of the branches of a conditional the one that moves most counts. Time is
not known here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from nag_jax.errors import NagJaxError
from nag_jax.plan.hlo import Computation, Instruction, Program, parse, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# The TPU compiler writes a reduce-scatter as a fusion of this name around an all-reduce.
FUSED_REDUCE_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation, as each device that takes part sees it.

    Attributes:
        kind: one of `KINDS`.
        num_bytes: of the whole array: what an all-gather returns, an all-reduce returns, a reduce-scatter takes.
        group_size: devices that it runs among.
        count: how often it runs in one run of the program.
    """

    kind: str
    num_bytes: int
    group_size: int
    count: int = 1

    @property
    def received_bytes(self) -> float:
        """Bytes that every device has to get from others in all runs together, by the best known algorithms.

        All but its own part for an all-gather, a reduce-scatter and an all-to-all; twice that for an all-reduce, which
        is the one after the other; all bytes for a permutation and a broadcast.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.num_bytes * self.count)
        once = self.num_bytes * (self.group_size - 1) / self.group_size
        return (2.0 if self.kind == "all-reduce" else 1.0) * once * self.count


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives that one run of a program makes.

    Args:
        hlo: text of the compiled program, `compiled.as_text()`.

    Returns:
        One entry for every collective of the text that runs.

    Raises:
        NagJaxError: the text is not understood; names the line.
    """
    program = parse(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    replicas = re.search(r"replica_count=(\d+)", hlo)
    num_devices = math.prod(int(found[1]) for found in (partitions, replicas) if found)
    return tuple(_collect(program, program.entry, num_devices))


def summarize(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """By kind: how many run ("count"), the bytes of their arrays ("bytes"), and what a device gets ("received")."""
    sums: dict[str, dict[str, float]] = {}
    for each in collectives:
        row = sums.setdefault(each.kind, {"count": 0, "bytes": 0, "received": 0.0})
        row["count"] += each.count
        row["bytes"] += each.num_bytes * each.count
        row["received"] += each.received_bytes
    return dict(sorted(sums.items()))


def _collect(program: Program, name: str, num_devices: int) -> list[Collective]:
    """The collectives of one run of the computation `name`."""
    found: list[Collective] = []
    instructions = program.computations[name]
    for instruction in instructions.values():
        opcode = instruction.opcode
        kind = opcode.removesuffix("-done")
        if kind in KINDS:
            start = instruction
            if opcode.endswith("-done"):
                start = instructions[instruction.operands[0]]
            if not _is_later_piece(instruction, instructions):
                found.append(_collective(kind, instruction, start, num_devices))
        elif opcode == "while":
            trips = program.trip_count(instruction)
            inner = _collect(program, instruction.attribute("body") or "", num_devices)
            found += [dataclasses.replace(each, count=each.count * trips) for each in inner]
        elif opcode == "conditional":
            branches = [_collect(program, branch, num_devices) for branch in _branches(instruction)]
            found += max(branches, key=lambda branch: sum(each.received_bytes for each in branch))
        elif opcode in ("fusion", "call", "async-start"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
            inner = _collect(program, called, num_devices)
            if called.startswith(FUSED_REDUCE_SCATTER):
                inner = [dataclasses.replace(each, kind="reduce-scatter") for each in inner]
            found += inner
    return found


def _is_later_piece(instruction: Instruction, instructions: Computation) -> bool:
    """Whether a collective was begun elsewhere.

    The TPU compiler cuts one that overlaps with other work into fusions of a common chain: the first has a custom call
    AsyncCollectiveStart beside the collective, and the others repeat the collective.
    """
    is_piece = "chain_id=" in instruction.rest
    return is_piece and not any('"AsyncCollectiveStart"' in each.rest for each in instructions.values())


def _collective(kind: str, result: Instruction, start: Instruction, num_devices: int) -> Collective:
    size = _group_size(start, num_devices)
    num_bytes = shape_bytes(result.shape)
    return Collective(kind, num_bytes * size if kind == "reduce-scatter" else num_bytes, size)


def _group_size(instruction: Instruction, num_devices: int) -> int:
    """Devices of a group. XLA writes groups as lists, as [groups, size]<=[devices], or as axes of a mesh."""
    text = instruction.rest
    if "source_target_pairs=" in text:
        return num_devices
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(counted[2])
    if named := re.search(r"replica_groups=(?:@)?mesh\[([^\]]*)\].*?\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, _, part in axes)
    if "replica_groups={}" in text:
        return num_devices
    raise NagJaxError(f"The devices of a collective are not understood: {instruction.name}({text[:200]}")


def _branches(conditional: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    names = [conditional.attribute(name) for name in ("true_computation", "false_computation")]
    return [name for name in names if name]
