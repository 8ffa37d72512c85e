"""What stands beside every run's results."""

from __future__ import annotations

import subprocess
from pathlib import Path

import jax
import pytest

from nag_jax.jobs import experiment
from nag_jax.jobs.experiment import COMPILER_FLAGS, commit, environment


def test_the_environment_names_versions_device_and_commit():
    found = environment()
    assert found["versions"]["jax"] == jax.__version__
    assert jax.devices()[0].device_kind in found["device"]
    assert {"commit", "command", "processes"} <= found.keys()


def test_compiler_flags_are_recorded_as_they_are_set_and_only_then(monkeypatch: pytest.MonkeyPatch):
    for name in COMPILER_FLAGS:
        monkeypatch.delenv(name, raising=False)
    assert environment()["compiler_flags"] == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=true")
    assert environment()["compiler_flags"] == {
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
        "LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=true",
    }


def test_a_changed_source_is_told_from_its_commit_and_a_changed_result_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    source, result = tmp_path / "nag_jax/jobs/experiment.py", tmp_path / "results/step.json"
    for file in (source, result):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    monkeypatch.setattr(experiment, "__file__", str(source))
    of_this_tree = commit.__wrapped__
    clean = git("rev-parse", "HEAD").strip()
    assert of_this_tree() == clean
    result.write_text("2\n")
    assert of_this_tree() == clean
    source.write_text("2\n")
    assert of_this_tree() == f"{clean}+changes"
