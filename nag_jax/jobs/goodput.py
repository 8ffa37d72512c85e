"""Where the wall time of a training process goes, and which share of it trained: goodput."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

TRAINING, WAITING = "training", "waiting for data"

Read = TypeVar("Read")


class Goodput:
    """A stopwatch that gives every second of a process to one stage, whichever the job names; a context manager.

    Goodput is the seconds of `TRAINING` over all since `start`: those of starting and restoring, compiling, saving,
    evaluating, and of devices that wait for data lower it. It is this process' alone. Steps that a later kill throws
    away count here, for nobody knows yet; the process that repeats them counts them as well.

    Args:
        start: when the process began, as `now` tells it.
        now: the clock, in seconds.

    Attributes:
        seconds: wall time by stage.
    """

    def __init__(self, start: float, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = {TRAINING: 0.0, WAITING: 0.0}
        self._start, self._now = start, now
        self._last = start  # end of what was given to a stage
        self._starved = 0.0  # since then
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="goodput")

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.shutdown()

    @property
    def value(self) -> float:
        """The share of training in all seconds up to the last `spend`."""
        return self.seconds[TRAINING] / (self._last - self._start)

    def spend(self, stage: str) -> float:
        """Gives the time since the last call to `stage`, but for that of `read` which is `WAITING`; returns all of it.

        What the devices do for `stage` must be finished: the host does not wait for them here.
        """
        now = self._now()
        elapsed, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed - self._starved
        self.seconds[WAITING] += self._starved
        self._starved = 0.0
        return elapsed

    def read(self, function: Callable[[], Read], running: Any) -> Read:
        """Calls `function`, which reads data, and counts as `WAITING` how long the devices stand still meanwhile.

        Args:
            function: returns the data.
            running: arrays that the devices are computing, the last that they were given; None if there are none.
        """
        asked = self._now()
        idle_from: Future[float] = self._watcher.submit(self._finished_at, running)
        data = function()
        if idle_from.done():  # otherwise the devices are busy still
            self._starved += self._now() - max(asked, idle_from.result())
        return data

    def _finished_at(self, running: Any) -> float:
        jax.block_until_ready(running)
        return self._now()
