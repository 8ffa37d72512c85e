"""The warning of idle GPUs, with made-up processes: there is no GPU here."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from nag_jax import gpus


@pytest.mark.parametrize(
    ("processes", "worst"),
    [
        ([(7, 1, 8)], (1, 8)),  # one task of SLURM on a node of eight
        ([(7, 8, 8)], (8, 8)),  # one process with all
        ([(7, 1, 2), (7, 1, 2), (9, 1, 2)], (1, 2)),  # the second host has one process of two
        ([(7, 1, 1), (7, 1, 1)], (2, 1)),  # every task is shown its own GPU alone
    ],
)
def test_the_host_with_most_idle_gpus(processes: list[tuple[int, int, int]], worst: tuple[int, int]):
    assert gpus.worst_host(np.array(processes, np.uint32)) == worst


@pytest.mark.parametrize(("visible", "is_said"), [(8, True), (1, False), (0, False)])
def test_a_process_that_has_one_gpu_of_several_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], visible: int, is_said: bool
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpus, "visible_gpus", lambda: visible)
    gpus.warn_of_idle_gpus()
    said = capsys.readouterr().err
    assert (f"Of the {visible} GPUs of a host this job uses 1." in said) == is_said
    assert ("--num_processes=1" in said) == is_said


def test_without_a_gpu_nothing_is_said(capsys: pytest.CaptureFixture[str]):
    gpus.warn_of_idle_gpus()
    assert capsys.readouterr().err == ""
