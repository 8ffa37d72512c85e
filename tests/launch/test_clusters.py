"""The launch scripts for GPUs, SLURM, Cloud TPU and GKE: what they would run, and what they run with stand-ins.

No tool of a cloud can be called here, installed or not: PATH holds stand-ins that only write down their calls, and the
few programs that the scripts themselves need.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXECUTABLE = ["launch/gpu_node.sh", "launch/slurm.sbatch", "launch/tpu_pod.sh", "launch/gke_xpk.sh"]
TOOLS = ["gcloud", "xpk", "srun", "scontrol", "nvidia-smi", "git"]
PROGRAMS = ["bash", "cat", "dirname", "head", "nohup", "rm", "sed", "sleep"]
AWKWARD = "--config.data.data_dir=/my data/it's $HOME"

RECORDER = """#!/usr/bin/env bash
{ printf '%s' "${0##*/}"; printf '\\037%s' "$@"; printf '\\036'; } >>"$CALLS"
case "${0##*/} $*" in
  *" describe "*) head -n 1 "$STATES"; sed -i 1d "$STATES" ;;
  "srun "*) exit "${SRUN_EXIT:-0}" ;;
esac
"""


class Tools:
    """A folder with stand-ins for the tools, first on PATH, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.states = folder / "states"
        for name in PROGRAMS:
            program = shutil.which(name)
            assert program is not None, f"{name} is missing on this machine"
            (self.bin / name).symlink_to(program)
        for name in TOOLS:
            self.add(name, RECORDER)

    def add(self, name: str, script: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def run(self, *command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder), "CALLS": str(self.calls_file)}
        environment |= {"STATES": str(self.states)} | variables
        return subprocess.run(
            [str(folder / command[0]), *command[1:]],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return [call.split("\x1f") for call in self.calls_file.read_text().split("\x1e")[:-1]]

    def dry_run(self, *command: str, **variables: str) -> list[list[str]]:
        """The commands that a dry run prints, split as a shell would; comments are left out."""
        result = self.run(*command[:2], "--dry-run", *command[2:], **variables)
        assert result.returncode == 0, result.stderr
        assert self.calls() == [], "a dry run has run something"
        return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


@pytest.mark.parametrize("script", EXECUTABLE)
def test_scripts_are_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


# Compiler flags


def flags(call: str, **variables: str) -> dict[str, str]:
    """The variables that a function of flags.sh leaves behind."""
    line = f'. launch/flags.sh; {call}; echo -n "${{XLA_FLAGS:-}}|${{LIBTPU_INIT_ARGS:-}}"'
    printed = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env={"PATH": "/usr/bin:/bin"} | variables, capture_output=True, check=True
    ).stdout.decode()
    return dict(zip(("XLA_FLAGS", "LIBTPU_INIT_ARGS"), printed.split("|"), strict=True))


def test_a_users_own_flags_come_last_and_so_win() -> None:
    mine = "--xla_gpu_enable_triton_gemm=true"
    assert flags("gpu_flags sample", XLA_FLAGS=mine)["XLA_FLAGS"].endswith(f" {mine}")
    assert flags("tpu_flags", LIBTPU_INIT_ARGS="--mine")["LIBTPU_INIT_ARGS"].endswith(" --mine")


def test_flags_of_a_tpu_stay_out_of_xla_flags_and_the_other_way_round() -> None:
    assert flags("tpu_flags")["XLA_FLAGS"] == ""
    assert flags("gpu_flags train")["LIBTPU_INIT_ARGS"] == ""


def test_products_are_left_to_cublas_where_that_was_measured() -> None:
    assert "triton_gemm" in flags("gpu_flags sample")["XLA_FLAGS"]
    assert "triton_gemm" not in flags("gpu_flags train")["XLA_FLAGS"]


def test_the_installed_jax_knows_the_flags_for_gpus() -> None:
    """XLA ends a process that has an unknown flag, whatever the device is."""
    environment = os.environ | flags("gpu_flags sample") | {"JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.devices()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# One machine with GPUs


def test_a_gpu_machine_is_set_up_and_runs_the_main_command(tools: Tools) -> None:
    assert tools.dry_run("launch/gpu_node.sh", "--mode=sample", AWKWARD) == [
        ["export", "NAG_JAX_EXTRA=gpu"],
        ["source", "launch/environment.sh"],
        ["prepare", "run"],
        ["source", "launch/flags.sh"],
        ["gpu_flags", "sample"],
        ["exec", ".venv/bin/python", "-m", "nag_jax.main", "--num_processes=1", "--mode=sample", AWKWARD],
    ]


@pytest.mark.parametrize(
    ("arguments", "job"),
    [
        (["--config=a.py"], "train"),
        (["--mode=train"], "train"),
        (["--mode", "sample", "--config=a.py"], "sample"),
        (["-mode", "evaluate"], "sample"),
        (["-mode=compare"], "sample"),
        (["--mode=sample", "--mode=train"], "train"),
        (["--mode=noise_shift"], "train"),
        (["--mode", "encode"], "train"),
        (["--workdir", "sample"], "train"),
    ],
)
@pytest.mark.parametrize("script", ["launch/gpu_node.sh", "launch/slurm.sbatch"])
def test_flags_are_those_of_what_the_mode_mostly_computes(
    tools: Tools, script: str, arguments: list[str], job: str
) -> None:
    commands = tools.dry_run(script, *arguments)
    assert ["gpu_flags", job] in commands
    (main,) = [command for command in commands if "nag_jax.main" in command]
    assert main[-len(arguments) :] == arguments


def test_a_machine_without_gpus_is_refused_before_anything_is_installed(tools: Tools) -> None:
    tools.add("nvidia-smi", "#!/bin/sh\nexit 9\n")
    result = tools.run("launch/gpu_node.sh", "--config=a.py")
    assert result.returncode == 2
    assert "nvidia-smi finds no GPU" in result.stderr and "launch/local.sh" in result.stderr
    (tools.bin / "nvidia-smi").unlink()
    result = tools.run("launch/gpu_node.sh", "--config=a.py")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "nvidia-smi is not on PATH" in line and "launch/local.sh" in line


@pytest.mark.parametrize("script", ["launch/gpu_node.sh", "launch/slurm.sbatch"])
def test_a_run_of_nothing_is_refused(tools: Tools, script: str) -> None:
    result = tools.run(script, "--dry-run")
    assert result.returncode == 2
    assert "--config" in result.stderr


# SLURM


def sbatch_options() -> dict[str, str]:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return dict((option.partition("=")[0], option.partition("=")[2]) for option in options)


def test_a_slurm_job_has_a_task_for_each_gpu_that_sees_all_gpus_of_its_node() -> None:
    """JAX gives a task the GPU of the number SLURM_LOCALID among those that it sees."""
    options = sbatch_options()
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & set(options)


def test_a_slurm_job_is_warned_before_its_end_and_queued_again() -> None:
    options = sbatch_options()
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert options["open-mode"] == "append", "a second start must not wipe out the log of the first"


def test_a_slurm_job_prepares_once_and_starts_all_tasks(tools: Tools) -> None:
    commands = tools.dry_run("launch/slurm.sbatch", AWKWARD)
    assert commands[-2:] == [
        ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "nag_jax.main", AWKWARD],
        ["scontrol", "requeue", "JOB"],
    ]
    assert commands.index(["prepare", "run"]) < len(commands) - 2


def test_a_slurm_script_run_by_hand_says_what_it_is_for(tools: Tools) -> None:
    result = tools.run("launch/slurm.sbatch", "--config=a.py")
    assert result.returncode == 2
    assert "sbatch" in result.stderr and "--dry-run" in result.stderr
    assert tools.calls() == []


@pytest.mark.parametrize(("code", "is_queued_again"), [(143, True), (0, False), (1, False)])
def test_a_stopped_slurm_job_is_queued_again_and_a_failed_one_is_not(
    tools: Tools, tmp_path: Path, code: int, is_queued_again: bool
) -> None:
    project = tmp_path / "a project"
    (project / "launch").mkdir(parents=True)
    for name in ["launch/slurm.sbatch", "launch/commands.sh", "launch/flags.sh"]:
        (project / name).write_text((ROOT / name).read_text())
    (project / "launch/environment.sh").write_text("prepare() { :; }\nneed() { :; }\n")
    # As SLURM does it: a copy of the script from elsewhere.
    spooled = tmp_path / "spool"
    spooled.mkdir()
    (spooled / "job").write_text((ROOT / "launch/slurm.sbatch").read_text())
    (spooled / "job").chmod(0o755)
    result = tools.run(
        "job", "--config=a.py", folder=spooled, SLURM_SUBMIT_DIR=str(project), SLURM_JOB_ID="77", SRUN_EXIT=str(code)
    )
    assert result.returncode == code, result.stderr
    assert tools.calls()[0][0] == "srun"
    assert (["scontrol", "requeue", "77"] in tools.calls()) == is_queued_again


def test_a_slurm_job_that_is_submitted_from_elsewhere_says_so(tools: Tools, tmp_path: Path) -> None:
    result = tools.run("launch/slurm.sbatch", "--config=a.py", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="77")
    assert result.returncode == 2
    assert "root of the project" in result.stderr


# Cloud TPU

PLACE = ["--zone=us-west4-a", "--project=mine"]
POD = ["--name=nag", *PLACE]
RUN = ["--config=c.py:sit_xl2,nag", "--workdir=gs://bucket/my runs/nag"]
GCLOUD = ["gcloud", "compute", "tpus"]


def remote(command: list[str]) -> str:
    """What a command of gcloud ssh runs on the workers."""
    assert command[:5] == [*GCLOUD, "tpu-vm", "ssh"]
    (line,) = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    return line


def test_a_slice_is_created_with_the_software_of_its_type(tools: Tools) -> None:
    for given, asked, version in [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
    ]:
        expected = [*GCLOUD, "tpu-vm", "create", "nag", *PLACE, f"--accelerator-type={asked}", f"--version={version}"]
        assert tools.dry_run("launch/tpu_pod.sh", "create", *POD, f"--type={given}") == [expected]


def test_a_slice_of_the_queue_is_asked_for_and_waited_for(tools: Tools) -> None:
    asking, waiting = tools.dry_run("launch/tpu_pod.sh", "queue", *POD, "--type=v6e-16", "--spot")
    assert asking == [
        *[*GCLOUD, "queued-resources", "create", "nag", *PLACE, "--node-id=nag"],
        *["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"],
    ]
    assert waiting[:5] == [*GCLOUD, "queued-resources", "describe"]


def test_waiting_ends_when_the_slice_is_there_or_can_never_be(tools: Tools) -> None:
    tools.add("sleep", "#!/bin/sh\n")
    tools.states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    result = tools.run("launch/tpu_pod.sh", "queue", *POD, "--type=v6e-16")
    assert result.returncode == 0, result.stderr
    assert len(tools.calls()) == 4
    tools.states.write_text("FAILED\n")
    result = tools.run("launch/tpu_pod.sh", "queue", *POD, "--type=v6e-16")
    assert result.returncode == 1
    assert "nag is FAILED" in result.stderr


def test_all_is_every_step_in_order(tools: Tools) -> None:
    commands = tools.dry_run("launch/tpu_pod.sh", "all", *POD, *RUN, "--type=v5e-16", "--data=gs://bucket/latents")
    assert [command[:5] if command[0] == "gcloud" else command[:3] for command in commands] == [
        [*GCLOUD, "tpu-vm", "create"],
        ["git", "bundle", "create"],
        [*GCLOUD, "tpu-vm", "scp"],
        ["rm", "nag_jax.bundle"],
        [*GCLOUD, "tpu-vm", "ssh"],
        [*GCLOUD, "tpu-vm", "ssh"],
        [*GCLOUD, "tpu-vm", "ssh"],
        [*GCLOUD, "tpu-vm", "ssh"],
    ]
    install, data, start, follow = (remote(command) for command in commands[4:])
    assert "prepare run" in install and "NAG_JAX_EXTRA=tpu" in install
    assert shlex.split(data)[-2:] == ["gs://bucket/latents", "data"]
    assert "launch/local.sh" in start and "tail" in follow
    workers = [word for command in commands[4:] for word in command if word.startswith("--worker=")]
    assert workers == ["--worker=all", "--worker=all", "--worker=all", "--worker=0"]
    queued = tools.dry_run("launch/tpu_pod.sh", "all", *POD, *RUN, "--type=v5e-16", "--queued")
    assert queued[0][3:5] == ["queued-resources", "create"]


def test_resuming_makes_the_slice_anew_and_starts_the_same_command(tools: Tools) -> None:
    settings = [*POD, *RUN, "--type=v5e-16", "--queued"]
    everything = tools.dry_run("launch/tpu_pod.sh", "all", *settings)
    resumed = tools.dry_run("launch/tpu_pod.sh", "resume", *settings)
    assert resumed[0] == [*GCLOUD, "queued-resources", "delete", "nag", *PLACE, "--force", "--quiet"]
    assert resumed[1:] == everything[:-1]


def test_a_slice_is_deleted_the_way_it_was_made(tools: Tools) -> None:
    assert tools.dry_run("launch/tpu_pod.sh", "delete", *POD) == [
        [*GCLOUD, "tpu-vm", "delete", "nag", *PLACE, "--quiet"]
    ]
    (queued,) = tools.dry_run("launch/tpu_pod.sh", "delete", *POD, "--queued")
    assert queued[3:5] == ["queued-resources", "delete"]


def test_the_variables_stand_in_for_the_flags(tools: Tools) -> None:
    variables = {"TPU_POD_NAME": "nag", "CLOUDSDK_COMPUTE_ZONE": "us-west4-a", "CLOUDSDK_CORE_PROJECT": "mine"}
    variables |= {"TPU_POD_TYPE": "v6e-16", "TPU_POD_SPOT": "yes", "TPU_POD_QUEUED": "yes"}
    variables |= {"TPU_POD_CONFIG": "c.py:sit_xl2,nag", "TPU_POD_WORKDIR": "gs://bucket/my runs/nag"}
    by_flags = tools.dry_run("launch/tpu_pod.sh", "all", *POD, *RUN, "--type=v6e-16", "--spot", "--queued")
    assert tools.dry_run("launch/tpu_pod.sh", "all", **variables) == by_flags


LOCAL = """#!/bin/bash
printf '%s\\n' "$NAG_JAX_EXTRA" "$LIBTPU_INIT_ARGS" "${JAX_COMPILATION_CACHE_DIR-none}" "$@"
[[ ! -e ../waits ]] || exec sleep 60
touch ../done
"""


class Worker:
    """The home folder of a worker, with a local.sh that writes down what it gets."""

    def __init__(self, home: Path) -> None:
        self.home = home
        launch = home / "nag_jax/launch"
        launch.mkdir(parents=True)
        (launch / "flags.sh").write_text((ROOT / "launch/flags.sh").read_text())
        (launch / "local.sh").write_text(LOCAL)
        (launch / "local.sh").chmod(0o755)

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.home)}
        return subprocess.run(["bash", "-c", line], cwd=self.home, env=environment, capture_output=True, text=True)

    def output(self) -> list[str]:
        end = time.monotonic() + 30
        while not (self.home / "done").exists():
            assert time.monotonic() < end, "the run in the background did not come to its end"
            time.sleep(0.02)
        return (self.home / "nag_jax.log").read_text().splitlines()


def test_arguments_arrive_on_a_worker_as_they_were_given(tools: Tools, tmp_path: Path) -> None:
    worker = Worker(tmp_path / "worker")
    (start,) = tools.dry_run("launch/tpu_pod.sh", "start", *POD, *RUN, "--", AWKWARD)
    result = worker.run(remote(start))
    assert result.returncode == 0, result.stderr
    extra, compiler_flags, cache, *arguments = worker.output()
    assert (extra, cache) == ("tpu", "none")
    assert compiler_flags == flags("tpu_flags")["LIBTPU_INIT_ARGS"]
    assert arguments == [*RUN, AWKWARD]


def test_compiled_programs_are_kept_in_the_bucket_if_it_is_named(tools: Tools, tmp_path: Path) -> None:
    worker, folder = Worker(tmp_path / "worker"), "gs://bucket/it's compiled"
    (by_flag,) = tools.dry_run("launch/tpu_pod.sh", "start", *POD, *RUN, f"--cache={folder}")
    assert tools.dry_run("launch/tpu_pod.sh", "start", *POD, *RUN, JAX_COMPILATION_CACHE_DIR=folder) == [by_flag]
    result = worker.run(remote(by_flag))
    assert result.returncode == 0, result.stderr
    assert worker.output()[2:] == [folder, *RUN]


def test_a_worker_gets_a_checkout_and_an_environment(tools: Tools, tmp_path: Path) -> None:
    home, source = tmp_path / "worker", tmp_path / "source"
    (source / "launch").mkdir(parents=True)
    home.mkdir()
    (home / "nag_jax").mkdir()  # of an installation before
    (source / "launch/environment.sh").write_text('prepare() { echo "$1 $NAG_JAX_EXTRA $PYTHON"; }\n')
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "c"]):
        subprocess.run(["git", "-C", str(source), *arguments], check=True)
    bundling, _, _, install = tools.dry_run("launch/tpu_pod.sh", "install", *POD)
    subprocess.run(bundling, cwd=source, check=True)
    (source / "nag_jax.bundle").rename(home / "nag_jax.bundle")
    # The worker's Python, which knows uv and with it a newer one.
    python = tmp_path / "python"
    python.mkdir()
    (python / "python3").write_text('#!/bin/sh\n[ "$4" != find ] || echo "/newer/python$6"\n')
    (python / "python3").chmod(0o755)
    environment = {"PATH": f"{python}:/usr/bin:/bin", "HOME": str(home)}
    result = subprocess.run(["bash", "-c", remote(install)], cwd=home, env=environment, capture_output=True, text=True)
    assert result.stdout == "run tpu /newer/python3.12\n", result.stderr
    commits = [
        subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, check=True).stdout
        for folder in (source, home / "nag_jax")
    ]
    assert commits[0] == commits[1]


def test_a_worker_on_which_the_run_goes_refuses_a_second_one(tools: Tools, tmp_path: Path) -> None:
    worker = Worker(tmp_path / "worker")
    (worker.home / "waits").touch()
    (start,) = tools.dry_run("launch/tpu_pod.sh", "start", *POD, *RUN)
    assert worker.run(remote(start)).returncode == 0
    second = worker.run(remote(start))
    os.kill(int((worker.home / "nag_jax.pid").read_text()), 9)
    assert second.returncode == 1
    assert "runs here already" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["create", "--zone=z", "--type=v6e-8"], "--name"),
        (["create", "--name=n", "--type=v6e-8"], "--zone"),
        (["create", "--name=n", "--zone=z"], "--type"),
        (["create", "--name=n", "--zone=z", "--type=v99-8"], "--version"),
        (["start", "--name=n", "--zone=z", "--workdir=gs://b/r"], "--config"),
        (["start", "--name=n", "--zone=z", "--config=c.py"], "--workdir"),
        (["start", "--name=n", "--zone=z", "--config=c.py", "--workdir=runs/x"], "gs://"),
        (["start", "--name=n", "--zone=z", "--colour=red"], "--colour=red"),
        (["begin"], "'begin'"),
        ([], "create, queue"),
    ],
)
def test_what_a_tpu_run_lacks_is_named(tools: Tools, arguments: list[str], named: str) -> None:
    result = tools.run("launch/tpu_pod.sh", *arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert tools.calls() == []


def test_a_missing_gcloud_is_named(tools: Tools) -> None:
    (tools.bin / "gcloud").unlink()
    result = tools.run("launch/tpu_pod.sh", "delete", *POD)
    assert result.returncode == 2
    assert "gcloud is not on PATH" in result.stderr and "Google Cloud CLI" in result.stderr


# GKE

CLUSTER = ["--cluster=tpus", "--name=nag", *PLACE]


def test_a_workload_is_submitted_with_its_whole_command(tools: Tools) -> None:
    arguments = [*CLUSTER, *RUN, "--type=v5e-256", "--slices=2"]
    (command,) = tools.dry_run("launch/gke_xpk.sh", "create", *arguments, "--", AWKWARD)
    assert command[:-1] == [
        *["xpk", "workload", "create", "--cluster=tpus", "--workload=nag", *PLACE, "--tpu-type=v5litepod-256"],
        *["--num-slices=2", "--max-restarts=50", "--base-docker-image=python:3.12", "--script-dir=."],
    ]
    bash, option, line = shlex.split(command[-1].removeprefix("--command="))
    assert (bash, option) == ("bash", "-c")
    assert "tpu_flags" in line and "NAG_JAX_EXTRA=tpu" in line
    assert shlex.split(line)[-4:] == ["./launch/local.sh", *RUN, AWKWARD]


def test_a_container_keeps_compiled_programs_in_the_bucket_if_it_is_named(tools: Tools) -> None:
    arguments = [*CLUSTER, *RUN, "--type=v6e-16", "--cache=gs://bucket/my programs"]
    (command,) = tools.dry_run("launch/gke_xpk.sh", "create", *arguments)
    line = shlex.split(command[-1].removeprefix("--command="))[2]
    assert "JAX_COMPILATION_CACHE_DIR=gs://bucket/my programs" in shlex.split(line.replace(";", " "))


def test_an_image_of_this_folder_has_what_git_tracks_and_nothing_else() -> None:
    """With a tracked file missing, results would name their commit with "+changes"."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    kept = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    assert kept == {line.partition("/")[0] for line in tracked.splitlines()} | {".git"}


def test_an_image_takes_the_place_of_this_folder(tools: Tools) -> None:
    arguments = [*CLUSTER, *RUN, "--type=v6e-16", "--image=registry/nag_jax:1"]
    (command,) = tools.dry_run("launch/gke_xpk.sh", "create", *arguments)
    assert "--docker-image=registry/nag_jax:1" in command
    assert not any(word.startswith(("--base-docker-image", "--script-dir")) for word in command)


def test_workloads_are_listed_and_deleted(tools: Tools) -> None:
    (listing,) = tools.dry_run("launch/gke_xpk.sh", "list", "--cluster=tpus", *PLACE)
    assert listing == ["xpk", "workload", "list", "--cluster=tpus", *PLACE]
    (deleting,) = tools.dry_run("launch/gke_xpk.sh", "delete", *CLUSTER)
    assert deleting == ["xpk", "workload", "delete", "--workload=nag", "--cluster=tpus", *PLACE]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["create", "--zone=z", "--name=n"], "--cluster"),
        (["create", "--cluster=c", "--zone=z"], "--name"),
        (["create", "--cluster=c", "--name=n"], "--zone"),
        (["create", "--cluster=c", "--name=n", "--zone=z"], "--type"),
        (["create", *CLUSTER, "--type=v6e-16", "--config=c.py", "--workdir=/tmp/x"], "gs://"),
        (["create", *CLUSTER, *RUN, "--type=v6e-16", "--slices=none"], "--slices=none"),
        (["submit"], "'submit'"),
    ],
)
def test_what_a_workload_lacks_is_named(tools: Tools, arguments: list[str], named: str) -> None:
    result = tools.run("launch/gke_xpk.sh", *arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert tools.calls() == []


@pytest.mark.parametrize("script", ["launch/tpu_pod.sh", "launch/gke_xpk.sh"])
def test_help_names_every_setting_that_the_script_reads(tools: Tools, script: str) -> None:
    printed = tools.run(script, "--help").stdout
    flags_read = {line.strip().split("=*)")[0] for line in (ROOT / script).read_text().splitlines() if "=*) " in line}
    assert {flag for flag in flags_read if flag not in printed} == set()
