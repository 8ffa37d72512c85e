"""Ctrl-C and SIGTERM: the first asks, the second interrupts, and afterwards all is as before."""

from __future__ import annotations

import os
import signal

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
