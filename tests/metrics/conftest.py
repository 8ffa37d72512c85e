"""A live peer of the metrics on features: torch-fidelity's functions, imported without torchvision."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest


class Torchvision:
    """Answers for torchvision and all in it: torch-fidelity imports it, and the functions tested never use it."""

    def find_spec(self, name, path=None, target=None):
        is_ours = name.partition(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec):
        return MagicMock(__path__=[])

    def exec_module(self, module):
        pass


@pytest.fixture(scope="session")
def torch_fidelity():
    """A function from the name of one of torch-fidelity's modules to the module."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    finder = Torchvision()
    sys.meta_path.append(finder)
    try:
        importlib.import_module("torch_fidelity")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    return lambda name: importlib.import_module(f"torch_fidelity.{name}")
