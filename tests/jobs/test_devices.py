"""The main job on eight (fake) devices: the same losses as on one, and checkpoints that move between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nag_jax.metric_writer import read_metrics

pytestmark = pytest.mark.serial

# A batch of 16 over eight devices; sampling batches are filled up to a multiple of them.
ALIKE = ("loss", "grad_norm", "loss/noise_kept", "dropped/label")


def assert_same_losses(found: Path, expected: Path) -> None:
    by_step = {line["step"]: line for line in read_metrics(expected)}
    lines = [line for line in read_metrics(found) if line["step"] in by_step]
    assert len(lines) >= 3
    for line in lines:
        for name in ALIKE:
            assert line[name] == pytest.approx(by_step[line["step"]][name], rel=1e-4), (line["step"], name)


def test_a_sharded_run_equals_one_device_and_goes_on_there(finished: Path, runs, tmp_path: Path):
    methods = "--config.eval.methods=('plain','nag')"
    runs.finish(tmp_path, "--config.parallel.fsdp=2", methods, devices=8)
    assert_same_losses(tmp_path, finished)
    assert list((tmp_path / "eval" / "step_6").glob("*/metrics.json"))
    runs.finish(tmp_path, "--config.num_steps=8", "--config.eval.methods=()")
    assert read_metrics(tmp_path)[-1]["step"] == 8


def test_pmap_equals_jit(finished: Path, runs, tmp_path: Path):
    runs.finish(tmp_path, "--config.parallel.mode=pmap", "--config.eval.methods=()", devices=8)
    assert_same_losses(tmp_path, finished)


def test_an_impossible_mesh_says_what_fits(runs, tmp_path: Path):
    _, errors = runs.finish(tmp_path / "w", "--config.parallel.fsdp=3", devices=8, expect=2)
    assert "does not use the 8 device(s) exactly. What fits" in errors
    assert not (tmp_path / "w").exists()
