"""The attention that a job computes by where `model.attention` is "auto": the fastest on its device and shapes.

It is chosen before the step or the sampler is compiled, and once: environment.json keeps the choice for each job and
kind of device, so that a resumed run computes as it did and a finished result is read back. What two attentions compute
differs by rounding. What each needs is `models/attention.py`'s affair.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nag_jax.errors import first_line
from nag_jax.hosts import from_first
from nag_jax.jobs.experiment import Experiment
from nag_jax.loading import ModelDescription
from nag_jax.models.attention import AUTO, AttentionName, AttentionShape, attention, candidates

Job = Literal["training", "sampling"]
ENTRY = "attention"  # of environment.json
REPEATS, CALLS = 5, 10  # a repeat waits for so many calls, for one may take less than it takes to start it
# A smaller advantage is taken for none: equal runs on equal devices shall not differ by the noise of a clock.
SMALLEST_ADVANTAGE = 0.05


def settled(experiment: Experiment, job: Job, *, rows: int) -> ModelDescription:
    """The network with the attention that `job` computes by; every process must call it.

    Where several are possible and none is recorded, the first process measures them on one of its devices.

    Args:
        experiment: config, devices and work folder.
        job: training measures forward and backward, sampling forward.
        rows: of a batch on each device.

    Returns:
        The description; its attention is not "auto".
    """
    description = experiment.description
    if description.model.attention != AUTO:
        return description  # a name wins
    return description.with_attention(from_first(lambda: _choose(experiment, job, rows)))


def _choose(experiment: Experiment, job: Job, rows: int) -> AttentionName:
    """The recorded choice of this kind of device, or a new one, which is recorded."""
    shape, device = experiment.description.attention_shape, jax.local_devices()[0]
    known: dict[str, Any] = experiment.recorded_environment().get(ENTRY, {})
    place, possible = f"{job} on {device.device_kind}", candidates(shape, device)
    if place in known and known[place]["name"] in possible:
        return known[place]["name"]
    tensor = experiment.mesh.shape["tensor"]
    of_device = shape._replace(heads=shape.heads // tensor if shape.heads % tensor == 0 else shape.heads)
    seconds = measure(possible, of_device, rows, with_gradient=job == "training") if len(possible) > 1 else {}
    name = fastest(possible, seconds)
    record = {"name": name, "seconds": seconds, "rows": rows} | of_device._asdict()
    experiment.update_environment({ENTRY: known | {place: record}})
    elsewhere = {other: each["name"] for other, each in known.items() if other.startswith(f"{job} on ")}
    if seconds or elsewhere:
        print(_line(place, record, elsewhere), file=sys.stderr, flush=True)
    return name


def _line(place: str, record: dict[str, Any], elsewhere: dict[str, str]) -> str:
    """What was chosen and why, and what is recorded of other devices, in one line."""
    line = f"Attention of {place}: {record['name']}"
    if record["seconds"]:
        times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in record["seconds"].items())
        line += f" ({times} for {record['rows']} rows of {record['tokens']} tokens)"
    return "; ".join([line, *(f"{other} took {name}" for other, name in elsewhere.items())])


def fastest(possible: Sequence[AttentionName], seconds: dict[AttentionName, float]) -> AttentionName:
    """The attention to take.

    Args:
        possible: in the order of preference without a measurement.
        seconds: of those that were measured and ran.

    Returns:
        The fastest, but one before it in the order that is slower by less than SMALLEST_ADVANTAGE; the last of
        `possible`, which runs everywhere, where nothing was measured to run.
    """
    if not seconds:
        return possible[-1]
    enough = (1.0 + SMALLEST_ADVANTAGE) * min(seconds.values())
    return next(name for name in possible if name in seconds and seconds[name] <= enough)


def measure(
    names: Sequence[AttentionName], shape: AttentionShape, rows: int, *, with_gradient: bool
) -> dict[AttentionName, float]:
    """Seconds that one call of each attention takes on this process' first device; of those that run there.

    Args:
        names: to measure.
        shape: of queries, keys and values.
        rows: of a batch.
        with_gradient: the gradients to all three as well.
    """
    size = (rows, shape.tokens, shape.heads, shape.head_dim)
    with jax.default_device(jax.local_devices()[0]):
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = tuple(jax.random.normal(key, size, jnp.dtype(shape.dtype)) for key in keys)
        seconds: dict[AttentionName, float] = {}
        for name in names:
            try:
                seconds[name] = _seconds(jax.jit(_one_layer(name, with_gradient)), arrays)
            except (RuntimeError, ValueError) as error:  # JAX, XLA and cuDNN each refuse in their own way
                reason = first_line(error)
                print(f"Attention {name!r} does not run here ({reason}).", file=sys.stderr, flush=True)
    return seconds


def _one_layer(name: AttentionName, with_gradient: bool) -> Callable[..., Any]:
    def layer(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        if not with_gradient:
            return attention(name, q, k, v)
        out, gradients = jax.vjp(lambda *inputs: attention(name, *inputs), q, k, v)
        return out, gradients(cotangent)

    return layer


def _seconds(compiled: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> float:
    """The median over REPEATS of the mean over CALLS, after a first call that compiles."""
    jax.block_until_ready(compiled(*arrays))
    means = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            results = compiled(*arrays)
        jax.block_until_ready(results)
        means.append((time.perf_counter() - start) / CALLS)
    return statistics.median(means)
