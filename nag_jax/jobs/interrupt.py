"""Ctrl-C and SIGTERM as a polite request: the job finishes its step, saves, and leaves."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Which signal asked the job to stop, if any.

    Args:
        is_agreed: whether several processes must stop after the same step.
    """

    def __init__(self, is_agreed: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self.is_agreed = is_agreed
        self.rounds = 0

    def __bool__(self) -> bool:
        return self.signal is not None

    def is_due(self) -> bool:
        """Whether to stop now; asked once a round of the job's loop. True on all processes in the same round."""
        # JAX stops at one more than the largest number that a process asked with, 0 where none has asked yet, and only
        # when it is asked with that very number. So rounds are counted, not steps: they begin at 1 and leave none out.
        self.rounds += 1
        if self.is_agreed and multihost_utils.reached_preemption_sync_point(self.rounds):
            self.signal = signal.SIGTERM
        return bool(self)


class Stopped(Exception):
    """A job stopped on request, with everything saved. The exit code is the shell's for that signal."""

    def __init__(self, request: StopRequest, message: str):
        super().__init__(message)
        assert request.signal is not None
        self.exit_code = 128 + request.signal


@contextlib.contextmanager
def stop_on_signals(*, at_one_step: bool = False) -> Iterator[StopRequest]:
    """Within the block the first Ctrl-C or SIGTERM only sets the request; a second one interrupts at once.

    Args:
        at_one_step: several processes stop together, whichever got the signal: the job asks `StopRequest.is_due`. JAX
            takes SIGTERM then (see `hosts.start`), tells the others and finds a round that none has passed; Ctrl-C is
            handed on as SIGTERM, and a second Ctrl-C ends the process. Otherwise each process stops for itself.
    """
    request = StopRequest(is_agreed=at_one_step and jax.process_count() > 1)
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: object) -> None:
        if request.is_agreed:
            os.kill(os.getpid(), signal.SIGTERM)
            # Python's own handler would wait for the end of a computation, and that for a host which may hang.
            signal.signal(number, signal.SIG_DFL)
            return
        request.signal = signal.Signals(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT,) if request.is_agreed else (signal.SIGINT, signal.SIGTERM):
        previous[each] = signal.signal(each, handle)
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
        if request.is_agreed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not JAX's any more: nothing asks it from here on
