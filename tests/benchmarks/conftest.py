"""The scripts in benchmarks/ as modules: they are no part of the package, and import their neighbours by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def load_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Imports benchmarks/NAME.py for the tests of one file."""
    names = []
    sys.path.insert(0, str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up by name
        names.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in names:
        del sys.modules[name]
