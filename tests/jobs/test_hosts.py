"""Several processes as one job: they train, evaluate, encode and stop together, and a lost one ends the others."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from nag_jax import hosts
from nag_jax.errors import UserError
from nag_jax.metric_writer import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN_ONLY = ["--config.eval.methods=()"]
LONG = [*TRAIN_ONLY, "--config.num_steps=200", "--config.checkpoint.every_steps=50", "--config.log.every_steps=10"]

# Compile fast, not well: many processes compile the same small programs here.
FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def start(
    runs: Any, workdir: Path, *arguments: str, processes: int = 2, devices: int = 1, of_last: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts the processes of a job with the same arguments, and the last one with `of_last` too."""
    shared = [f"--coordinator_address={free_address()}", f"--num_processes={processes}", *arguments]
    own = [[f"--process_id={i}", *(of_last if i == processes - 1 else ())] for i in range(processes)]
    with mock.patch.dict(os.environ, FAST):
        return [runs.start(workdir, *shared, *each, devices=devices) for each in own]


def start_alone(runs: Any, workdir: Path, *arguments: str) -> list[subprocess.Popen]:
    with mock.patch.dict(os.environ, FAST):
        return [runs.start(workdir, *arguments)]


def finish(started: list[subprocess.Popen], expect: int = 0) -> list[str]:
    """Waits for all; returns what each said on standard error."""
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [expect] * len(started), "\n".join(said)
    return said


def wait_until(condition: Callable[[], bool], started: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert all(process.poll() is None for process in started) and time.monotonic() < deadline, [
            process.communicate()[1] for process in started
        ]
        time.sleep(0.02)


def assert_same_losses(found: Path, expected: Path, tolerance: float = 1e-4) -> None:
    # A line averages the steps since the last one; those after an interruption average fewer.
    by_steps = {(before["step"], line["step"]): line for before, line in pairwise(read_metrics(expected))}
    lines = {(before["step"], line["step"]): line for before, line in pairwise(read_metrics(found))}
    shared = lines.keys() & by_steps.keys()
    assert len(shared) >= 3
    for steps in shared:
        line, other = lines[steps], by_steps[steps]
        for name in ("loss", "grad_norm", "loss/noise_kept", "dropped/label"):
            assert line[name] == pytest.approx(other[name], rel=tolerance), (steps, name)


def assert_close(found: Any, expected: Any) -> None:
    """The same JSON, with numbers that are equal up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        expected, found = list(expected.values()), [found[key] for key in expected]
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for each, other in zip(found, expected, strict=True):
            assert_close(each, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert found == expected


def result(workdir: Path, name: str) -> dict[str, Any]:
    (file,) = workdir.glob(f"eval/step_*/*/{name}.json")
    return json.loads(file.read_text())


@pytest.mark.serial
def test_two_processes_train_and_evaluate_as_one(finished: Path, runs, tmp_path: Path):
    said = finish(start(runs, tmp_path, "--config.parallel.fsdp=2", "--config.eval.methods=('plain','nag')"))
    assert "sampling" in said[0] and "sampling" not in said[1], "one process shows progress"
    assert_same_losses(tmp_path, finished)
    for method in ("plain", "nag"):
        one, two = (result(folder, "metrics")["methods"][method] for folder in (finished, tmp_path))
        assert two["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=1e-3)
        one, two = (result(folder, "noise_shift")["methods"][method] for folder in (finished, tmp_path))
        for key in ("num_forward", "num_sampled"):
            assert one[key] == two[key]
        estimates = [each["mean_absolute_shift"]["estimate"] for each in (one, two)]
        assert estimates[1] == pytest.approx(estimates[0], rel=1e-3, abs=1e-5)


@pytest.mark.serial
def test_stopped_and_killed_they_end_together_and_go_on_as_if_never_interrupted(runs, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start_alone(runs, whole, *LONG))

    def reached(step: int) -> bool:
        return any(line["step"] >= step for line in read_metrics(broken))

    started = start(runs, broken, *LONG, "--config.parallel.steps_per_dispatch=2")
    wait_until(lambda: reached(20), started)
    started[1].send_signal(signal.SIGTERM)
    said = finish(started, expect=128 + signal.SIGTERM)
    stopped_at = max(line["step"] for line in read_metrics(broken))
    assert all(f"Stopped at step {stopped_at}; saved." in each for each in said)
    assert (broken / "checkpoints" / str(stopped_at)).is_dir()

    started = start(runs, broken, *LONG)
    wait_until(lambda: reached(stopped_at + 10), started)
    started[1].kill()
    died = time.monotonic()
    _, errors = started[0].communicate(timeout=120)
    assert started[0].returncode != 0 and time.monotonic() - died < 120
    assert "another process of this job has ended" in errors or "another task died" in errors
    started[1].communicate()

    finish(start_alone(runs, broken, *LONG))
    assert_same_losses(broken, whole, tolerance=2e-3)


@pytest.mark.serial
def test_a_signal_between_a_save_and_the_first_round_stops_all_in_it(tmp_path: Path):
    address = free_address()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(which: int) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).with_name("stopped_hosts.py")), address, str(which)]
        return subprocess.Popen(
            [*command, str(tmp_path)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    for process in [run(0), run(1)]:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.splitlines()[-1] == f"1 {signal.SIGTERM}"


@pytest.mark.serial
@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_write_ends_them_all(runs, tmp_path: Path):
    started = start(runs, tmp_path, *LONG, "--config.parallel.fsdp=2")
    wait_until((tmp_path / "checkpoints/50").is_dir, started)
    # Its files may not grow longer than a few bytes, as on a full disk.
    resource.prlimit(started[1].pid, resource.RLIMIT_FSIZE, (100, 100))
    filled = time.monotonic()
    said = [process.communicate(timeout=240)[1] for process in started]
    assert time.monotonic() - filled < 120 and all(process.returncode != 0 for process in started)
    assert f"error: A checkpoint could not be written to {tmp_path / 'checkpoints'}" in said[1]
    assert "another process of this job has ended" in said[0] or "another task died" in said[0]
    finish(start_alone(runs, tmp_path, *LONG))
    assert read_metrics(tmp_path)[-1]["step"] == 200


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize(("number", "which"), [(signal.SIGTERM, 1), (signal.SIGKILL, 0)])
def test_an_interrupted_comparison_goes_on_on_another_number_of_processes(
    finished: Path, runs, tmp_path: Path, number: signal.Signals, which: int
):
    arguments = ["--mode=compare", f"--checkpoint={finished}", "--config.eval.num_samples=400", "--config.eval.name=c"]
    arguments += ["--config.compare.cfg_scales=(1.0,2.0)", "--config.compare.nag_scales=(0.0,1.0)"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start_alone(runs, whole, *arguments))
    started = start(runs, broken, *arguments)
    wait_until(lambda: len(list(broken.glob("compare/c/blocks/*/*.npz"))) > 4, started)
    started[which].send_signal(number)
    sent = time.monotonic()
    said = [process.communicate(timeout=240)[1] for process in started]
    assert time.monotonic() - sent < 120 and all(process.returncode != 0 for process in started)
    other = said[1 - which]
    assert "another process of this job has ended" in other or "another task died" in other
    kept = len(list(broken.glob("compare/c/blocks/*/*.npz")))
    assert kept > 4 and not (broken / "compare/c/compare.json").exists()

    said = finish(start(runs, broken, *arguments, processes=4))
    one, other = (json.loads((folder / "compare/c/compare.json").read_text()) for folder in (whole, broken))
    assert_close(other, one)
    assert not (broken / "compare/c/blocks").exists()


@pytest.mark.serial
def test_another_setting_on_one_host_is_refused_by_all(finished: Path, runs, tmp_path: Path):
    arguments = ["--mode=sample", f"--checkpoint={finished}", "--config.eval.name=drawn"]
    started = start(runs, tmp_path / "new", *arguments, of_last=("--config.sampling.nag_scale=3",))
    for said in finish(started, expect=UserError.exit_code):
        assert "error: Process(es) 1 have another --mode, folder or setting than process 0." in said
    assert not (tmp_path / "new").exists()


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--config.parallel.fsdp=4"], ["--config.parallel.tensor=4"], ["--config.parallel.mode=pmap"]]
)
def test_four_processes_train_as_one(finished: Path, runs, tmp_path: Path, arguments: list[str]):
    finish(start(runs, tmp_path, *TRAIN_ONLY, *arguments, processes=4))
    assert_same_losses(tmp_path, finished)
    finish(start(runs, tmp_path, *TRAIN_ONLY, "--config.num_steps=8", devices=2))
    assert read_metrics(tmp_path)[-1]["step"] == 8


@pytest.fixture(scope="module")
def pair(finished: Path, runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two_hosts.py, run by two processes and by one, and what the two reported."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    for name, count in (("samples", 50), ("reference", 60)):
        np.savez(folder / f"{name}.npz", rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(runs.data_dir)} | FAST

    def run(address: str, which: int) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).with_name("two_hosts.py")), address, str(which), str(folder)]
        command.append(str(finished))
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    address = free_address()
    started = [run(address, which) for which in (0, 1)]
    reports = []
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        reports.append(json.loads(output.splitlines()[-1]))
    finish([run("", 0)])
    return folder, reports


@pytest.mark.serial
def test_they_agree_or_all_say_what_differs(pair):
    for report in (each["agreements"] for each in pair[1]):
        assert report["from_first"] == ["of", 0]
        assert report["error_of_first"] == "UserError: Not this one."
        assert report["same"] is None and report["shared"] is None
        assert report["not_same"].startswith("UserError: Process(es) 1 have another hat than process 0.")
        assert "Process(es) 1 do not see" in report["not_shared"] and "must share" in report["not_shared"]


@pytest.mark.serial
def test_rows_are_disjoint_and_complete_and_arrays_come_back_whole(pair):
    reports = [each["arrays"] for each in pair[1]]
    assert sorted(report["rows"] for report in reports) == [[0, 4], [4, 8]]
    assert sorted(report["part"] for report in reports) == [[0, 2], [1, 2]]
    for report in reports:
        assert report["local_part"] and report["to_host"]
        assert "batch of 9 examples" in report["not_divisible"] and "multiple of 2" in report["not_divisible"]


@pytest.mark.serial
def test_two_processes_judge_images_as_one(pair):
    folder, _ = pair
    metrics = [json.loads(next((folder / f"judged-{n}").rglob("metrics.json")).read_text()) for n in (1, 2)]
    for key in ("seconds", "environment"):
        assert [each.pop(key) for each in metrics]
    assert metrics[0] == metrics[1] and metrics[0]["num_samples"] == 50


@pytest.mark.serial
def test_two_processes_draw_the_same_samples_as_one(pair):
    folder, _ = pair
    one, two = (np.load(folder / f"sampled-{n}/samples/drawn/samples.npz") for n in (1, 2))
    assert one["arr_0"].shape == (30, 8, 8, 1)
    np.testing.assert_array_equal(one["arr_1"], two["arr_1"])
    difference = np.abs(one["arr_0"].astype(int) - two["arr_0"])
    # Rounded otherwise, a value half way between two bytes may fall to either side.
    assert difference.max() <= 1 and np.count_nonzero(difference) <= 0.002 * difference.size


@pytest.mark.serial
def test_two_processes_take_the_attention_that_the_first_measured_to_be_fastest(pair):
    """The second measured the opposite, and would have taken one that does not run on a CPU."""
    folder, _ = pair
    environment = json.loads((folder / "sampled-2/environment.json").read_text())
    assert environment["attention"]["sampling on cpu"]["name"] == "xla"
    conditions = json.loads((folder / "sampled-2/samples/drawn/conditions.json").read_text())
    assert conditions["attention"] == "xla"


@pytest.mark.serial
def test_two_processes_measure_and_compare_as_one(pair):
    folder, _ = pair
    one, two = (json.loads((folder / f"measured-{n}/noise_shift/drawn/noise_shift.json").read_text()) for n in (1, 2))
    assert_close(two, one)
    assert one["methods"].keys() == {"nag"}
    one, two = (json.loads((folder / f"measured-{n}/compare/drawn/compare.json").read_text()) for n in (1, 2))
    assert_close(two, one)
    assert [(entry["cfg_scale"], entry["nag_scale"]) for entry in two["entries"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.serial
def test_two_processes_encode_the_same_shards_as_one(pair):
    folder, _ = pair
    one, two = (
        {
            file.relative_to(folder / name): file.read_bytes()
            for file in (folder / name).rglob("*")
            if file.is_file() and file.name != "environment.json"
        }
        for name in ("latents-1", "latents-2")
    )
    assert len(one) > 15 and one == two


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "--process_id must be given too"),
        ((None, 2, 1), "--coordinator_address must be given too"),
        (("host:1", None, None), "--num_processes and --process_id must be given too"),
        (("host:1", 2, 2), "--process_id=2 is not one of 0 to 1"),
        (("host:1", 2, -1), "--process_id=-1 is not one of 0 to 1"),
        (("host", 2, 0), "is not HOST:PORT"),
        ((":80", 2, 0), "is not HOST:PORT"),
        ((None, 0, None), "--num_processes=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(given: tuple, message: str):
    with pytest.raises(UserError, match=message):
        hosts.start(*given)


def test_alone_nothing_is_started_and_everything_is_free():
    # In a process that has used no device yet, as the start of several hosts wants it.
    script = """
import jax
from nag_jax import hosts
from nag_jax.errors import NagJaxError

hosts.start()
hosts.start(num_processes=1)
assert not jax.distributed.is_initialized() and hosts.is_first()
hosts.wait_for_all("nobody")
assert hosts.from_first(lambda: "mine") == "mine"
hosts.check_same("hat", "green")
assert not hosts.is_loss_of_a_process(NagJaxError("UNAVAILABLE"))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=120)


def test_a_coordinator_that_does_not_answer_is_waited_for_and_then_named():
    address = free_address()
    script = f"from nag_jax import hosts; hosts.start({address!r}, 2, 1, timeout=2)"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert ended.returncode == UserError.exit_code
    assert f"error: process 0 at {address} did not answer within 2 s" in ended.stderr.decode()
