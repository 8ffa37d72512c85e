"""The roofline: the least time that a program can take on a device, by what the device publishes. An estimate.

Products at their peak, every byte of memory at full bandwidth, and every link busy: real programs take longer.
"""

from __future__ import annotations

import dataclasses

from nag_jax.plan.topologies import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one run of a program needs on each device at least.

    Attributes:
        compute_seconds: for the products.
        memory_seconds: for reading and writing memory.
        communication_seconds: for what comes in from other devices.
    """

    compute_seconds: float
    memory_seconds: float
    communication_seconds: float

    @property
    def seconds(self) -> float:
        """All three at the same time."""
        return max(self.compute_seconds, self.memory_seconds, self.communication_seconds)

    @property
    def seconds_without_overlap(self) -> float:
        """Communication while nothing else goes on."""
        return max(self.compute_seconds, self.memory_seconds) + self.communication_seconds

    @property
    def communication_share(self) -> tuple[float, float]:
        """Share of the time that is lost to communication in [0, 1]: hidden behind the rest, and not hidden at all."""
        alone = max(self.compute_seconds, self.memory_seconds)
        hidden = 1.0 - alone / self.seconds if self.seconds else 0.0
        bare = self.communication_seconds / self.seconds_without_overlap if self.seconds_without_overlap else 0.0
        return hidden, bare


def roofline(chip: Chip, *, flops: float, memory_bytes: float, received_bytes: float) -> Roofline:
    """The roofline of one device.

    Args:
        chip: what the device can do.
        flops: operations that it has to do.
        memory_bytes: bytes that it has to read or write.
        received_bytes: bytes that it has to get from other devices.
    """
    return Roofline(flops / chip.flops, memory_bytes / chip.hbm_bandwidth, received_bytes / chip.ici_bandwidth)
