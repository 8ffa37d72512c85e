"""metrics.jsonl and TensorBoard: every step once, also after a kill."""

from __future__ import annotations

from pathlib import Path

from nag_jax.metric_writer import MetricWriter, read_metrics


def write(workdir: Path, first_step: int, steps: range, loss: float) -> None:
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


def test_no_file_means_no_lines(tmp_path: Path):
    assert read_metrics(tmp_path) == []
