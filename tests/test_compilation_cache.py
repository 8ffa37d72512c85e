"""The cache of compiled programs: on for accelerators, where the user says, and never on CPUs."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from nag_jax import compilation_cache


@pytest.fixture
def cache_dir(monkeypatch: pytest.MonkeyPatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)


def test_accelerators_keep_their_programs(cache_dir, monkeypatch: pytest.MonkeyPatch):
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use()
    assert cache_dir() is None, "this is a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compilation_cache.use()
    assert cache_dir() == str(Path.home() / ".cache/nag_jax/compiled")


@pytest.mark.parametrize("chosen", ["", "/elsewhere"])
def test_what_the_user_said_stays(cache_dir, monkeypatch: pytest.MonkeyPatch, chosen: str):
    jax.config.update("jax_compilation_cache_dir", chosen)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compilation_cache.use()
    assert cache_dir() == chosen
