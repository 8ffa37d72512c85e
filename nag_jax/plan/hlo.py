"""The text of a compiled program (HLO) as computations and instructions. What they mean is their reader's affair."""

from __future__ import annotations

import dataclasses
import math
import re

from nag_jax.errors import NagJaxError

BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # others end in their number of bits, such as bf16 and f8e4m3fn

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: its name.
        shape: of its result, such as "f32[8,4]{1,0}", or a tuple of them.
        opcode: such as "fusion".
        rest: operands and attributes, as they stand there.
        is_root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    def attribute(self, name: str) -> str | None:
        """The name of a computation in the attribute `name=%computation`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name, each its instructions by name.
        entry: the computation that it begins with.
    """

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int:
        """How often a "while" runs its body.

        JAX's scans count from 0 by 1, so where the compiler does not write a loop's count down, it is the constant that
        the loop's condition compares with.

        Raises:
            NagJaxError: neither is found.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[loop.attribute("condition") or ""]
        constants = {
            name: int(each.rest.split(")")[0])
            for name, each in condition.items()
            if each.opcode == "constant" and re.match(r"\d+\)", each.rest)
        }
        if len(constants) != 1:
            raise NagJaxError(f"How often the loop {loop.name} runs is not understood: its condition has {constants}.")
        return next(iter(constants.values()))


def parse(text: str) -> Program:
    """Reads the text of a compiled program, `compiled.as_text()`.

    Raises:
        NagJaxError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            current[name] = Instruction(name, shape, opcode, rest, is_root=bool(root))
    if not entry:
        raise NagJaxError("The compiled program's text has no ENTRY; this version of XLA writes it another way.")
    return Program(computations, entry)


def shape_bytes(shape: str) -> int:
    """Bytes of a shape of HLO, such as "f32[8,4]{1,0}" or a tuple of them."""
    total = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = BITS[dtype] if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
        total += math.ceil(math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8)
    return total
