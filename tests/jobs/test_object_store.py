"""A whole run whose work folder is on an object store: what works without append and rename, and what is left out.

All files of a work folder but the checkpoints are written and read back on a stand-in for gs:// that refuses both
(tests/object_store.py). Checkpoints are orbax's, which reaches a store by code of its own; here they lie on the disk.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from nag_jax import checkpoint
from nag_jax.config import from_config_dict
from nag_jax.jobs import compare, noise_shift, sample, train
from nag_jax.metric_writer import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
WORKDIR = epath.Path("gs://bucket/runs/digits")


@pytest.fixture
def checkpoints_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Checkpoints of gs://NAME lie in a folder NAME on the disk."""
    original = checkpoint.Checkpoints.__init__

    def on_disk(self: checkpoint.Checkpoints, directory: Any, *arguments: Any, **options: Any) -> None:
        original(self, tmp_path / os.fspath(directory).removeprefix("gs://"), *arguments, **options)

    monkeypatch.setattr(checkpoint.Checkpoints, "__init__", on_disk)


@pytest.mark.usefixtures("checkpoints_on_disk")
def test_a_run_trains_resumes_evaluates_and_reports_on_an_object_store(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    settings = runpy.run_path(str(ROOT / "configs/digits.py"))["get_config"]("smoke")
    settings.num_steps, settings.checkpoint.every_steps, settings.log.every_steps = 3, 1, 1
    settings.eval.methods, settings.log.profile_steps = (), (2, 3)
    train.run(from_config_dict(settings), WORKDIR)
    assert any(path.endswith(".xplane.pb") for path in object_store.objects), "a trace was asked for"
    settings = runpy.run_path(str(ROOT / "configs/digits.py"))["get_config"]("smoke")
    settings.log.every_steps = 1
    config = from_config_dict(settings)
    report = train.run(config, WORKDIR)

    assert report == WORKDIR / "report.html" and b"</html>" in report.read_bytes()
    assert [line["step"] for line in read_metrics(WORKDIR)] == list(range(1, config.num_steps + 1))
    names = {name.removeprefix("bucket/runs/digits/") for name in object_store.objects}
    assert names >= {"config.json", "model.json", "environment.json", "metrics.jsonl", "report.html"}
    (folder,) = WORKDIR.glob(f"eval/step_{config.num_steps}/*")
    assert {path.name for path in folder.iterdir()} >= {"conditions.json", "metrics.json", "samples.png"}
    assert set(json.loads((folder / "metrics.json").read_text())["methods"]) == set(config.eval.methods)

    # The same command again reads everything back and draws nothing.
    before = dict(object_store.objects)
    train.run(config, WORKDIR)
    changed = {name for name in before if object_store.objects.get(name) != before[name]}
    assert changed <= {f"bucket/runs/digits/{name}" for name in ("environment.json", "report.html")}

    for job in (sample, noise_shift, compare):
        assert job.run(config, WORKDIR, WORKDIR).exists()
    assert not [name for name in object_store.objects if "/blocks/" in name]
