"""metrics.jsonl and TensorBoard: every step once, also after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from etils import epath

from nag_jax import metric_writer
from nag_jax.errors import NagJaxError
from nag_jax.metric_writer import MetricWriter, read_metrics


def write(workdir: epath.PathLike, first_step: int, steps: range, loss: float) -> None:
    writer = MetricWriter(workdir, first_step)
    for step in steps:
        writer.write(step, {"loss": loss})
    writer.close()


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path):
    write(tmp_path, 0, range(1, 6), 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    write(tmp_path, 3, range(4, 8), 2.0)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["loss"] for line in lines] == [1.0] * 3 + [2.0] * 4


def test_tensorboard_files_are_written(tmp_path: Path):
    write(tmp_path, 0, range(1, 3), 1.0)
    (event_file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in event_file.read_bytes()


def test_a_full_disk_is_named_and_no_line_before_is_lost(tmp_path: Path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    file, kept = tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"
    file.rename(kept)
    file.symlink_to("/dev/full")
    with pytest.raises(NagJaxError, match=r"Cannot write .*metrics\.jsonl: No space left on device\. Free space"):
        writer.write(2, {"loss": 1.0})
    kept.replace(file)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_no_file_means_no_lines(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_an_object_store_gets_every_line_though_it_cannot_append(object_store: Any):
    workdir = epath.Path("gs://bucket/run")
    write(workdir, 0, range(1, 6), 1.0)
    write(workdir, 3, range(4, 8), 2.0)
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["loss"] for line in lines] == [1.0] * 3 + [2.0] * 4
    events = [content for name, content in object_store.objects.items() if "tensorboard/events" in name]
    assert events and all(b"loss" in content for content in events)


def test_after_a_flush_a_kill_loses_no_line(object_store: Any):
    workdir = epath.Path("gs://bucket/run")
    killed = MetricWriter(workdir, 0)
    killed.write(1, {"loss": 1.0})
    killed.flush()
    killed.write(2, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(workdir)] == [1]
    killed.close()  # else TensorBoard's thread would look for the store after the test


def test_lines_are_sent_now_and_then_without_a_flush(object_store: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metric_writer, "SECONDS_BETWEEN_SENDS", 0.0)
    workdir = epath.Path("gs://bucket/run")
    writer = MetricWriter(workdir, 0)
    writer.write(1, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(workdir)] == [1]
    writer.close()
