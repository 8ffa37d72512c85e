"""Machines by name: the devices of a TPU topology without a TPU, and what one device can do.

The TPU compiler of the package `libtpu` makes the devices; they can be compiled for, not run on. Speeds of a chip are
those that its maker publishes, not measurements; its memory is what the compiler lets a program have.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

import jax

from nag_jax.errors import UserError, first_line

GIB = 2**30
LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: "TPU v5e".
        flops: peak of dense products in bfloat16, FLOP/s.
        hbm_bytes: memory that a program can have, as the compiler of libtpu 0.0.42 says it of one that is too large.
            Published are 32 GiB for v4 and v6e, 16 for v5e and 192 for TPU7x, which is all of it, and 95 for v5p, which
            is what is left of 96.
        hbm_bandwidth: bytes/s, reading and writing together.
        ici_bandwidth: bytes/s that all its links to other chips bring in at once: half of what is published as
            bidirectional, which is the sum of both directions. A chip at the edge of a slice has fewer links.
        devices: devices that JAX sees of it. Each is given its part of all the above, and what they exchange within the
            chip is counted as if it went over the links.
        source: where the speeds are published.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int
    source: str

    def of_one_device(self) -> Chip:
        """A device's share of the chip."""
        return dataclasses.replace(
            self,
            flops=self.flops / self.devices,
            hbm_bytes=self.hbm_bytes / self.devices,
            hbm_bandwidth=self.hbm_bandwidth / self.devices,
            ici_bandwidth=self.ici_bandwidth / self.devices,
            devices=1,
        )


_DOCS = "https://docs.cloud.google.com/tpu/docs/"
# The figure that is not on the pages of Cloud TPU is v4's: 6 links of 50 GB/s. It is taken to be one way, for the JAX
# scaling book (jax-ml.github.io/scaling-book/tpus) gives 45 GB/s one way. Some editions of v5e's page have 800 GiB/s of
# memory for 819 GB/s.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1200e9, 300e9, 1, f"{_DOCS}v4; links: arXiv 2304.01433, table 4"),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 1, f"{_DOCS}v5e"),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, 1, f"{_DOCS}v5p"),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 400e9, 1, f"{_DOCS}v6e"),
    "tpu7x": Chip("TPU7x", 2307e12, 2 * 94.75 * GIB, 7380e9, 600e9, 2, f"{_DOCS}tpu7x"),
}
# What `device_kind` says of the same chips, for the machine's own devices.
GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
# Generations that Cloud TPU names by cores, two a chip: v4-8 has four chips, v5e-8 has eight.
NAMED_BY_CORES = ("v4", "v5p", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: "v5e:4x4", or "local".
        devices: as many as JAX would see.
        chip: what one of them can do; None where that is not known here.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None


def known_topologies() -> dict[str, str]:
    """Every name that `--topology` takes besides other shapes, and the shape that it stands for."""
    names = {LOCAL: LOCAL}
    for generation in CHIPS:
        for chips, shape in (FLAT if generation in ("v5e", "v6e") else CUBIC).items():
            topology = f"{generation}:{shape}"
            names[topology] = topology
            names[f"{generation}-{2 * chips if generation in NAMED_BY_CORES else chips}"] = topology
    return names


def topology_name(name: str) -> str:
    """The shape that `name` stands for: "v4-8" is "v4:2x2x1".

    Raises:
        UserError: there is no such generation, or no slice of that size; names the nearest.
    """
    known = known_topologies()
    if name in known:
        return known[name]
    generation, colon, shape = name.partition(":")
    if generation in CHIPS and colon and shape.replace("x", "").isdigit():
        return name
    nearest = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(CHIPS)
    raise UserError(
        f"--topology={name} is not a machine known here. Nearest: {', '.join(nearest)}. A shape is GENERATION:AxB "
        f"(v5e, v6e) or GENERATION:AxBxC ({', '.join(NAMED_BY_CORES)}); {LOCAL} is this machine."
    )


def open_topology(name: str) -> Topology:
    """The devices of a topology.

    Args:
        name: a key of `known_topologies`, or another shape of its generations.

    Returns:
        The topology. Named TPUs need no TPU here.

    Raises:
        UserError: an unknown name, a shape that does not exist, or `libtpu` is not installed.
    """
    name = topology_name(name)
    if name == LOCAL:
        devices = tuple(jax.devices())
        generation = GENERATIONS.get(devices[0].device_kind)
        return Topology(LOCAL, devices, CHIPS[generation].of_one_device() if generation else None)
    generation, _, shape = name.partition(":")
    return Topology(name, _tpu_devices(generation, shape), CHIPS[generation].of_one_device())


def _tpu_devices(generation: str, shape: str) -> tuple[Any, ...]:
    # Off a Cloud machine, libtpu would ask a metadata server that does not answer, and complain at length.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # Compiling touches no TPU, so it need not wait for another process that holds the library.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # JAX drives both cores of a v4 chip as one device, which has to be asked for here.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}", **options
        )
    except Exception as error:  # The class depends on the version of JAX; the reason is in the text.
        reason = first_line(error)
        if "INVALID_ARGUMENT" in reason:
            shapes = ", ".join(FLAT.values() if generation in ("v5e", "v6e") else CUBIC.values())
            raise UserError(
                f"{generation}:{shape} is not a slice that the TPU compiler knows ({reason}). Usual shapes: {shapes}."
            ) from error
        raise UserError(
            f"The TPU compiler cannot be loaded ({reason}). Install it: pip install 'nag_jax[plan]'; it needs no TPU."
        ) from error
    return tuple(description.devices)
