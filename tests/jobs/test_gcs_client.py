"""A run on gs:// through Google's own path: the gcsfs client and orbax's storage driver, against an emulator.

Left out by default, and skipped without the two packages: pip install gcsfs gcp-storage-emulator. The emulator is one
process on this machine with no permissions, quotas or delays; what it has of a store is that files are written whole.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
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


def run(variables: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "nag_jax.main", "--config=configs/digits.py:smoke", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


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
