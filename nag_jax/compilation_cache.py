"""Compiled programs are kept between runs, on GPUs and TPUs, where compiling a large network takes a minute or more."""

from __future__ import annotations

from pathlib import Path

import jax


def use() -> None:
    """Turns JAX's persistent cache on, in ~/.cache/nag_jax/compiled, unless JAX_COMPILATION_CACHE_DIR says otherwise.

    An empty JAX_COMPILATION_CACHE_DIR turns it off. On CPUs it stays off: programs of one processor may not run on
    another that shares the home folder. To be called once the devices are known to JAX.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/nag_jax/compiled"))
