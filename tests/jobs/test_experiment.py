"""What stands beside every run's results."""

from __future__ import annotations

import jax
import pytest

from nag_jax.jobs.experiment import COMPILER_FLAGS, environment


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
