"""The host's part of sampling: which network calls each row makes, as arrays, and whether they can be made at all.

A guidance's tables become *layouts* (how many calls of which network a row makes, static in a compiled program) and
*slots* (which condition each call drops, its time shift and its weight: data). The program is `sampler.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from nag_jax.denoiser import Denoiser
from nag_jax.diffusion.guidance import MODEL, Branch, Guidance
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError


class Calls(NamedTuple):
    """`num_slots` calls of one network within one row, run as one batch."""

    network: str
    is_posterior: bool
    num_slots: int

    @property
    def key(self) -> str:
        """The name of these calls' slots in a row."""
        return f"{self.network} posterior" if self.is_posterior else self.network


Layout: TypeAlias = tuple[Calls, ...]


def layout_of(table: Mapping[Branch, np.ndarray]) -> Layout:
    """Which calls the branches of a table make; the base's network stands first."""
    counts: dict[tuple[str, bool], int] = {}
    for branch in table:
        group = (branch.network, branch.noise == "posterior")
        counts[group] = counts.get(group, 0) + 1
    return tuple(Calls(network, is_posterior, count) for (network, is_posterior), count in counts.items())


def call_rows(
    tables: Sequence[Mapping[Branch, np.ndarray]], row_layouts: Sequence[Layout], layouts: tuple[Layout, ...]
) -> dict[str, Any]:
    """The calls of every row as arrays: {"layout": [R], "calls": {key: {"weight": [R, slots, channels], ...}}}."""
    num_channels = len(next(iter(tables[0].values())))
    num_slots: dict[str, int] = {}
    for layout in layouts:
        for calls in layout:
            num_slots[calls.key] = max(num_slots.get(calls.key, 0), calls.num_slots)
    slots = {
        key: {
            "drop_label": np.zeros((len(tables), count), bool),
            "drop_noise": np.zeros((len(tables), count), bool),
            "time_shift": np.zeros((len(tables), count)),
            "weight": np.zeros((len(tables), count, num_channels)),
        }
        for key, count in num_slots.items()
    }
    for row, table in enumerate(tables):
        used = dict.fromkeys(num_slots, 0)
        for branch, weight in table.items():
            key = Calls(branch.network, branch.noise == "posterior", 0).key
            slot = used[key]
            used[key] += 1
            slots[key]["drop_label"][row, slot] = branch.drop_label
            slots[key]["drop_noise"][row, slot] = branch.noise == "null"
            slots[key]["time_shift"][row, slot] = branch.time_shift
            slots[key]["weight"][row, slot] = weight
    layout_index = np.array([layouts.index(layout) for layout in row_layouts], np.int32)
    return {"layout": layout_index, "calls": slots}


def observed_rows(rows: Mapping[str, np.ndarray], observe_times: Sequence[float] | None) -> np.ndarray:
    """True at the rows to observe [R]; only rows whose state is a state of the path."""
    candidates = np.flatnonzero(rows["start"] > 0.5)
    observed = np.zeros(len(rows["t"]), bool)
    if observe_times is None:
        observed[candidates] = True
    else:
        for t in observe_times:
            observed[candidates[np.argmin(np.abs(rows["t"][candidates] - t))]] = True
    return observed


def check_networks(denoiser: Denoiser, networks: Mapping[str, Denoiser]) -> None:
    """Refuses networks of another process or of states of another shape than the sampled denoiser's."""
    for name, network in networks.items():
        if network.process != denoiser.process:
            raise UserError(
                f"Network {name!r} was made for {network.process}, the sampled one for {denoiser.process}. "
                "Guidance mixes predictions at the same noise level: use networks of one process."
            )
        if network.sample_shape != denoiser.sample_shape:
            raise UserError(
                f"Network {name!r} predicts states of shape {network.sample_shape}, the sampled one of shape "
                f"{denoiser.sample_shape}. Guidance needs networks of one shape."
            )


def check_guidance(
    name: str, guidance: Guidance, networks: Mapping[str, Denoiser], estimator: Estimator | None
) -> None:
    if guidance.base.noise == "posterior":
        raise UserError(f"Guidance {name!r} has a posterior branch as its base; the base must be a network call.")
    for branch in guidance.branches:
        if branch.network not in networks:
            raise UserError(
                f"Guidance {name!r} needs the network {branch.network!r}: pass it in "
                f"`networks`. Known: {', '.join(networks)}."
            )
        network = networks[branch.network]
        if branch.drop_label and not network.has_null_label:
            raise UserError(f"Guidance {name!r} drops the class, but network {branch.network!r} has no null class.")
        if branch.noise == "null" and not network.has_null_noise:
            raise UserError(
                f"Guidance {name!r} drops the noise level, but network {branch.network!r} was not trained with "
                "noise-condition dropout. Train it so, or use nag(..., null='posterior') with an estimator."
            )
        if branch.noise == "posterior" and estimator is None:
            raise UserError(f"Guidance {name!r} has a posterior null branch: pass `estimator`.")
        if not branch.drop_label and network.num_classes != networks[MODEL].num_classes:
            raise UserError(
                f"Guidance {name!r} asks network {branch.network!r} for a class, but it has {network.num_classes} "
                f"classes and the sampled one has {networks[MODEL].num_classes}."
            )


def check_mixing(
    denoiser: Denoiser,
    networks: Mapping[str, Denoiser],
    times: np.ndarray,
    tables: Sequence[Mapping[Branch, np.ndarray]],
) -> None:
    """Refuses rows that mix predictions of another kind where it does not determine the sampled denoiser's kind."""
    for t, table in zip(times, tables, strict=True):
        for branch in table:
            # The posterior branch adds a difference of scores, which stays regular.
            if branch.noise != "posterior":
                denoiser.process.check_conversion(t, networks[branch.network].prediction, denoiser.prediction)


def check_labels(labels: np.ndarray | jax.Array, num_classes: int) -> None:
    host = np.asarray(labels)
    if host.ndim != 1 or host.size == 0:
        raise UserError(f"labels must be a non-empty list of classes, got shape {host.shape}.")
    if not np.issubdtype(host.dtype, np.integer):
        raise UserError(f"labels must be integers, got {host.dtype}.")
    if host.min() < 0 or host.max() >= num_classes:
        raise UserError(
            f"labels must lie in [0, {num_classes}), got {host.min()} to {host.max()}. The null class is reached "
            "through guidance, never as a label."
        )
