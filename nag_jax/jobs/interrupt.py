"""Ctrl-C and SIGTERM as a polite request: the job finishes its step, saves, and leaves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """Which signal asked the job to stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


class Stopped(Exception):
    """A job stopped on request, with everything saved. The exit code is the shell's for that signal."""

    def __init__(self, request: StopRequest, message: str):
        super().__init__(message)
        assert request.signal is not None
        self.exit_code = 128 + request.signal


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first Ctrl-C or SIGTERM only sets the request; a second one interrupts at once."""
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: object) -> None:
        request.signal = signal.Signals(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        previous[each] = signal.signal(each, handle)
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
