"""A run on gs:// through Google's own path: the gcsfs client and orbax's storage driver, against an emulator.

Left out by default, and skipped without the two packages: pip install gcsfs gcp-storage-emulator. The emulator is one
process on this machine with no permissions, quotas or delays; what it has of a store is that files are written whole.
Jobs of several processes share it, as hosts share a bucket.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nag_jax.metric_writer import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("gcsfs", "gcp_storage_emulator"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.serial,
    pytest.mark.skipif(not IS_INSTALLED, reason="gcsfs and gcp-storage-emulator are not installed"),
]
# Orbax's driver asks for the generation of what it reads, which the emulator knows and does not say. It answers one
# request after another, so the object that it looked up last is the one that it answers with.
SERVER = """
import sys
from gcp_storage_emulator import server, storage

looked_up = {}
get_file_obj, write_file = storage.Storage.get_file_obj, server.Response.write_file

def remember(self, *arguments):
    looked_up["object"] = get_file_obj(self, *arguments)
    return looked_up["object"]

def with_generation(self, *arguments, **options):
    self["x-goog-generation"] = str(looked_up["object"].get("generation", 1))
    write_file(self, *arguments, **options)

storage.Storage.get_file_obj, server.Response.write_file = remember, with_generation
server.create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Starts an emulator and gives the variables under which gcsfs and tensorstore go to it."""
    port = free_port()
    url = f"http://localhost:{port}"
    log = (tmp_path / "emulator.log").open("w")
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=log, stderr=log)
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/storage/v1/b/bucket", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "emulator.log").read_text()
            time.sleep(0.1)
    yield {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GS_TOKEN": "anon",
        # Else gcsfs asks the real service, for a minute each time, what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    server.terminate()
    server.wait(30)
    log.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(variables: dict[str, str], *arguments: str, processes: int = 1) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "nag_jax.main", "--config=configs/digits.py:smoke", *arguments]
    command.append(f"--num_processes={processes}")
    if processes > 1:
        command.append(f"--coordinator_address=localhost:{free_port()}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]


def finish(started: list[subprocess.Popen[str]], expect: int = 0) -> list[str]:
    """Waits for all; returns what each said."""
    said = ["".join(process.communicate(timeout=400)) for process in started]
    assert [process.returncode for process in started] == [expect] * len(started), "\n".join(said)
    return said


def run(variables: dict[str, str], *arguments: str) -> str:
    return finish(start(variables, *arguments))[0]


def read_object(variables: dict[str, str], name: str) -> bytes | None:
    """An object of the bucket, or None."""
    url = f"{variables['STORAGE_EMULATOR_HOST']}/download/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
    try:
        with urllib.request.urlopen(f"{url}?alt=media", timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return None


def losses(lines: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """The mean loss of the steps between two lines."""
    return {(before["step"], line["step"]): line["loss"] for before, line in pairwise(lines)}


ANOTHER_HOST_WRITES = """
import os, urllib.request
from etils import epath
import nag_jax.storage

folder = epath.Path("gs://bucket/shared")
(folder / "mine").write_text("1")
assert [path.name for path in folder.iterdir()] == ["mine"]
assert not (folder / "theirs").exists()
url = os.environ["STORAGE_EMULATOR_HOST"] + "/upload/storage/v1/b/bucket/o?uploadType=media&name=shared/theirs"
urllib.request.urlopen(urllib.request.Request(url, data=b"2", method="POST")).close()
assert (folder / "theirs").exists() and (folder / "theirs").read_text() == "2"
assert sorted(path.name for path in folder.glob("*")) == ["mine", "theirs"]
"""


def test_what_another_host_writes_is_seen(store: dict[str, str]):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **store}
    command = [sys.executable, "-c", ANOTHER_HOST_WRITES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr


def test_the_main_command_trains_resumes_and_samples_on_gs(store: dict[str, str], tmp_path: Path):
    variables = store | {"TFDS_DATA_DIR": str(tmp_path / "data")}
    workdir = "--workdir=gs://bucket/runs/digits"
    steps = ["--config.log.every_steps=1", "--config.checkpoint.every_steps=1"]
    run(variables, workdir, *steps, "--config.num_steps=3", "--config.eval.methods=()")
    output = run(variables, workdir, *steps)
    assert "Going on at step 3 of gs://bucket/runs/digits" in output
    assert "report: gs://bucket/runs/digits/report.html" in output
    assert "written: gs://" in run(variables, "--mode=sample", "--checkpoint=gs://bucket/runs/digits")


def test_processes_share_a_bucket_stop_together_and_go_on_in_another_number(store: dict[str, str], tmp_path: Path):
    variables = store | {"TFDS_DATA_DIR": str(tmp_path / "data")}
    steps = ["--config.num_steps=100", "--config.checkpoint.every_steps=20", "--config.log.every_steps=10"]
    steps.append("--config.eval.methods=('plain','nag')")
    run(variables, f"--workdir={tmp_path / 'whole'}", *steps)

    workdir = "--workdir=gs://bucket/runs/shared"
    started = start(variables, workdir, *steps, processes=2)
    end = time.monotonic() + 300
    while read_object(variables, "runs/shared/checkpoints/20/commit_success.txt") is None:
        assert all(process.poll() is None for process in started) and time.monotonic() < end
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    for said in finish(started, expect=128 + signal.SIGTERM):
        assert "Stopped at step" in said and "saved. The same command goes on from there." in said

    said = finish(start(variables, workdir, *steps, processes=4))
    assert all("report: gs://bucket/runs/shared/report.html" in each for each in said)
    assert "Going on at step" in said[0] and b"</html>" in (read_object(variables, "runs/shared/report.html") or b"")
    lines = (read_object(variables, "runs/shared/metrics.jsonl") or b"").decode().splitlines()
    found, expected = losses([json.loads(line) for line in lines]), losses(read_metrics(tmp_path / "whole"))
    shared = found.keys() & expected.keys()
    assert len(shared) >= 5
    for between in shared:
        assert found[between] == pytest.approx(expected[between], rel=1e-4)

    for mode in ("sample", "compare"):
        arguments = [f"--mode={mode}", "--checkpoint=gs://bucket/runs/shared", "--config.eval.name=two"]
        for said in finish(start(variables, *arguments, *steps, processes=2)):
            assert f"written: gs://bucket/runs/shared/{'samples' if mode == 'sample' else mode}/two" in said
