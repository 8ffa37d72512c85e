"""The cache of compiled programs: on for accelerators, where the user says, buckets too, and never on CPUs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

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


def test_programs_are_kept_in_a_bucket_and_found_there(cache_dir, object_store: Any, monkeypatch: pytest.MonkeyPatch):
    """On a store that cannot rename: what the first of two equal programs wrote, the second one reads."""
    opened: list[tuple[str, str]] = []
    open_object = object_store._open

    def recorded(path: str, mode: str = "rb", **options: Any) -> Any:
        opened.append((path, mode))
        return open_object(path, mode, **options)

    monkeypatch.setattr(object_store, "_open", recorded)
    jax_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compilation_cache.use()
    at_once = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": 0}
    before = {name: jax.config.values[name] for name in at_once}
    try:
        for name, value in at_once.items():
            jax.config.update(name, value)

        def program(scale: float, x: jax.Array) -> jax.Array:
            return jnp.sin(scale * x).sum()

        x = jnp.arange(7.0)
        first = jax.jit(functools.partial(program, 2.0))(x)
        (written,) = [path for path, mode in opened if mode == "wb" and "jit_program" in path]
        assert written.startswith("bucket/compiled/")
        opened.clear()
        assert float(jax.jit(functools.partial(program, 2.0))(x)) == float(first)
        assert opened == [(written, "rb")]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()
