"""The rule for skipped parity tests: counted, and failures where continuous integration has the peers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HAS_PEERS = sys.version_info[:2] == (3, 11)

# One file that is skipped as a whole before its markers are known, one whose test skips, one that passes.
SUITE = {
    "test_whole.py": """
import pytest
pytest.importorskip("a_peer_that_is_not_installed")
pytestmark = pytest.mark.parity
def test_one(): pass
def test_two(): pass
""",
    "test_single.py": """
import pytest
@pytest.mark.parity
def test_three(): pytest.importorskip("a_peer_that_is_not_installed")
def test_other_skip(): pytest.skip("no parity test")
def test_passes(): pass
""",
}


def run_suite(folder: Path, workers: int, *arguments: str, **variables: str) -> tuple[int, str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = parity\naddopts = --import-mode=importlib\n")
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    for name, source in SUITE.items():
        (folder / name).write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", str(workers), "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_parity_tests_are_counted(tmp_path: Path, workers: int) -> None:
    code, output = run_suite(tmp_path, workers)
    assert code == 0, output
    assert "parity tests skipped: 3 (" in output


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("test_whole.py", "a file of parity tests was skipped: test_whole.py"),
        ("test_single.py", "a parity test was skipped: test_single.py::test_three"),
    ],
)
def test_a_skipped_parity_test_fails_where_ci_has_the_peers(tmp_path: Path, file: str, message: str) -> None:
    code, output = run_suite(tmp_path, 1, file, CI="true")
    if HAS_PEERS:
        assert code not in (0, 5), output
        assert message in output
    else:
        assert code in (0, 5), output
        assert "(they need Python 3.11)" in output
