"""Runs of the main command for the tests of jobs: tiny networks, real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


class Runs:
    """Starts the main command on the digits' smoke config."""

    def __init__(self, data_dir: Path):
        self.data_dir = data_dir

    def start(self, workdir: Path | None, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nag_jax.main"]
        if workdir is not None:
            command.append(f"--workdir={workdir}")
        if not any(argument.startswith(("--config=", "--mode=")) for argument in arguments):
            command.append("--config=configs/digits.py:smoke")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(self.data_dir)}
        if devices > 1:
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(self, workdir: Path | None, *arguments: str, expect: int = 0, devices: int = 1) -> tuple[str, str]:
        process = self.start(workdir, *arguments, devices=devices)
        output, errors = process.communicate(timeout=600)
        assert process.returncode == expect, errors
        return output, errors

    def interrupt(self, workdir: Path | None, number: signal.Signals, when: Callable[[], bool], *arguments: str) -> str:
        """Starts, waits until `when`, sends the signal and returns what was said on standard error."""
        process = self.start(workdir, *arguments)
        deadline = time.monotonic() + 300
        while not when():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert process.returncode == expected, errors
        return errors


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    output, _ = runs.finish(workdir)
    assert output.splitlines()[-1] == f"report: {workdir / 'report.html'}"
    return workdir
