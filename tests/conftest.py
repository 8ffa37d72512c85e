"""What every test runs under: the CPU, fixed hypothesis draws, the torch DiT, and the rule for skipped parity tests.

Parity tests compare with live peers (PyTorch and friends) that are installed on Python 3.11 only. Elsewhere
they skip and the summary counts them; under continuous integration on 3.11 a skipped one is a failure.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax

import hypothesis
import pytest

# deadline: the first example of a test may compile; derandomize: the same examples in every run.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

_HAS_PEERS = sys.version_info[:2] == (3, 11)
_MUST_NOT_SKIP = _HAS_PEERS and bool(os.environ.get("CI"))


def _module(path: str) -> ModuleType:
    """A module of this folder that holds no tests, which importlib mode imports by no name."""
    file = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def torch_dit() -> ModuleType:
    """The module tests/models/torch_dit.py; skips without torch."""
    pytest.importorskip("torch")
    return _module("models/torch_dit.py")


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty `ObjectStore` of tests/object_store.py, which every gs:// path of epath leads to."""
    return _module("object_store.py").install(monkeypatch)


@pytest.fixture(scope="session")
def on_eight_devices() -> Callable[..., dict[str, Any]]:
    """Runs a script in a process with eight CPU devices, and gives the JSON that it prints as its last line."""
    root = Path(__file__).parent.parent

    def run(script: Path, *arguments: str, flags: str = "") -> dict[str, Any]:
        devices = "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
        environment = {"PYTHONPATH": str(root), "XLA_FLAGS": f"{devices} {flags}".strip(), "JAX_PLATFORMS": "cpu"}
        finished = subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **environment},
            cwd=root,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        return json.loads(finished.stdout.splitlines()[-1])

    return run


class _Mocks(ModuleType):
    """A module in which everything that is asked for is a mock."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> mock.MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class _StandInForTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `_Mocks` under every name of torchvision."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        is_torchvision = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_torchvision else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Mocks(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A mock has nothing to run."""


@pytest.fixture(scope="session")
def import_peer() -> Callable[[str], ModuleType]:
    """Imports a module of a peer that asks for torchvision, which no test uses and the peers come without."""

    def import_(name: str) -> ModuleType:
        pytest.importorskip("torch")
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            pytest.skip(f"{name} is not installed")
        finder = _StandInForTorchvision()
        sys.meta_path.insert(0, finder)
        try:
            return importlib.import_module(name)
        finally:
            sys.meta_path.remove(finder)
            for module in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
                del sys.modules[module]

    return import_


class ParitySkips:
    """Counts the parity tests that were skipped, one by one or as a whole file, for the summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.root = config.rootpath
        self.count = 0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.count += _parity_tests_in(self.root / report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and "parity" in report.keywords and not hasattr(report, "wasxfail"):
            self.count += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.count:
            why = "requirements/parity.txt is not installed" if _HAS_PEERS else "they need Python 3.11"
            terminalreporter.write_line(f"parity tests skipped: {self.count} ({why})", yellow=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ParitySkips(config))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if _MUST_NOT_SKIP and report.skipped and _parity_tests_in(collector.path):
        report.outcome = "failed"
        report.longrepr = f"a file of parity tests was skipped: {collector.nodeid}: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _MUST_NOT_SKIP and report.skipped and "parity" in item.keywords and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"a parity test was skipped: {item.nodeid}: {report.longrepr}"
    return report


def _parity_tests_in(path: os.PathLike[str]) -> int:
    """Test functions in a file skipped before its markers were known; 0 if it is no file of parity tests."""
    if not os.path.isfile(path):
        return 0
    with open(path, encoding="utf-8") as file:
        source = file.read()
    return len(re.findall(r"^\s*def test_", source, flags=re.MULTILINE)) if "mark.parity" in source else 0
