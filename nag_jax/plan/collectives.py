"""The collectives of a compiled program, read from its text (HLO): kind, bytes and how often they run.

A loop's body counts as often as the loop runs. JAX's scans count from 0 by 1, so where the compiler does not write a
loop's count down, it is the constant that the loop's condition compares with. Of the branches of a conditional the
one that moves most counts. Time is not known here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from nag_jax.errors import NagJaxError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # others end in their number of bits, such as bf16 and f8e4m3fn
# The TPU compiler writes a reduce-scatter as a fusion of this name around an all-reduce.
FUSED_REDUCE_SCATTER = "all-reduce-scatter"

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    def attribute(self, name: str) -> str | None:
        """The name of a computation in the attribute `name=%computation`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives that one run of a program makes.

    Args:
        hlo: text of the compiled program, `compiled.as_text()`.

    Returns:
        One entry for every collective of the text that runs.

    Raises:
        NagJaxError: the text is not understood; names the line.
    """
    computations, entry = _parse(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    replicas = re.search(r"replica_count=(\d+)", hlo)
    num_devices = math.prod(int(found[1]) for found in (partitions, replicas) if found)
    return tuple(_collect(computations, entry, num_devices))


def summarize(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """By kind: how many run ("count"), the bytes of their arrays ("bytes"), and what a device gets ("received")."""
    sums: dict[str, dict[str, float]] = {}
    for each in collectives:
        row = sums.setdefault(each.kind, {"count": 0, "bytes": 0, "received": 0.0})
        row["count"] += each.count
        row["bytes"] += each.num_bytes * each.count
        row["received"] += each.received_bytes
    return dict(sorted(sums.items()))


def shape_bytes(shape: str) -> int:
    """Bytes of a shape of HLO, such as "f32[8,4]{1,0}" or a tuple of them."""
    total = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = BITS[dtype] if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
        total += math.ceil(math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8)
    return total


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Computations by name, each its instructions by name; and the name of the entry."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry = ""
    current: dict[str, _Instruction] = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _Instruction(*found.groups())
    if not entry:
        raise NagJaxError("The compiled program's text has no ENTRY; this version of XLA writes it another way.")
    return computations, entry


def _collect(
    computations: dict[str, dict[str, _Instruction]], name: str, num_devices: int
) -> list[Collective]:
    """The collectives of one run of the computation `name`."""
    found: list[Collective] = []
    instructions = computations[name]
    for instruction in instructions.values():
        opcode = instruction.opcode
        kind = opcode.removesuffix("-done")
        if kind in KINDS:
            start = instruction
            if opcode.endswith("-done"):
                start = instructions[re.findall(r"%?([\w.\-]+)[,)]", instruction.rest)[0]]
            if not _is_later_piece(instruction, instructions):
                found.append(_collective(kind, instruction, start, num_devices))
        elif opcode == "while":
            trips = _trip_count(computations, instruction)
            inner = _collect(computations, instruction.attribute("body") or "", num_devices)
            found += [dataclasses.replace(each, count=each.count * trips) for each in inner]
        elif opcode == "conditional":
            branches = [_collect(computations, branch, num_devices) for branch in _branches(instruction)]
            found += max(branches, key=lambda branch: sum(each.received_bytes for each in branch))
        elif opcode in ("fusion", "call", "async-start"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
            inner = _collect(computations, called, num_devices)
            if called.startswith(FUSED_REDUCE_SCATTER):
                inner = [dataclasses.replace(each, kind="reduce-scatter") for each in inner]
            found += inner
    return found


def _is_later_piece(instruction: _Instruction, instructions: dict[str, _Instruction]) -> bool:
    """Whether a collective was begun elsewhere.

    The TPU compiler cuts one that overlaps with other work into fusions of a common chain: the first has a custom call
    AsyncCollectiveStart beside the collective, and the others repeat the collective.
    """
    is_piece = "chain_id=" in instruction.rest
    return is_piece and not any('"AsyncCollectiveStart"' in each.rest for each in instructions.values())


def _collective(kind: str, result: _Instruction, start: _Instruction, num_devices: int) -> Collective:
    size = _group_size(start, num_devices)
    num_bytes = shape_bytes(result.shape)
    return Collective(kind, num_bytes * size if kind == "reduce-scatter" else num_bytes, size)


def _group_size(instruction: _Instruction, num_devices: int) -> int:
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


def _trip_count(computations: dict[str, dict[str, _Instruction]], loop: _Instruction) -> int:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations[loop.attribute("condition") or ""]
    constants = {
        name: int(each.rest.split(")")[0])
        for name, each in condition.items()
        if each.opcode == "constant" and re.match(r"\d+\)", each.rest)
    }
    if len(constants) != 1:
        raise NagJaxError(f"How often the loop {loop.name} runs is not understood: its condition has {constants}.")
    return next(iter(constants.values()))


def _branches(conditional: _Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.rest):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    names = [conditional.attribute(name) for name in ("true_computation", "false_computation")]
    return [name for name in names if name]
