"""Ctrl-C and SIGTERM: the first asks, the second interrupts, and afterwards all is as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nag_jax.jobs.interrupt import Stopped, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: signal.Signals):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.signal == number
        assert Stopped(stop, "").exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_on_several_hosts_the_first_ctrl_c_is_handed_on_and_the_second_ends_the_process():
    script = """
import os, signal
from unittest import mock
from nag_jax.jobs.interrupt import stop_on_signals

signal.signal(signal.SIGTERM, lambda *_: print("handed on", flush=True))  # in JAX's place
with mock.patch("jax.process_count", return_value=2), stop_on_signals(at_one_step=True):
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on", flush=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("may be caught, and cleaned up for a long time")
"""
    root = Path(__file__).resolve().parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGINT and ended.stdout.splitlines() == ["handed on", "goes on"]
