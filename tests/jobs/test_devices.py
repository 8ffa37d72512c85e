"""The main job on eight (fake) devices: the same losses as on one, and checkpoints that move between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


def test_samples_do_not_depend_on_the_devices(finished: Path, runs, tmp_path: Path):
    """The same images from one device in batches of 50 and from eight in batches of 7, which are filled up to 8."""
    images = {}
    for devices, batch_size in ((1, 50), (8, 7)):
        arguments = [
            "--mode=sample",
            f"--checkpoint={finished}",
            "--config.eval.methods=('cfg+nag',)",
            "--config.eval.num_samples=50",
            "--config.sampling.weights=params",
            "--config.sampling.stepper=euler_maruyama",
            f"--config.sampling.batch_size={batch_size}",
        ]
        output, _ = runs.finish(tmp_path / str(devices), *arguments, devices=devices)
        with np.load(Path(output.splitlines()[-1].removeprefix("written: ")) / "samples.npz") as samples:
            images[devices] = samples["arr_0"].astype(int)
    # Other batch shapes round otherwise, so a value half way between two bytes may fall to either side.
    difference = images[1] - images[8]
    assert np.abs(difference).max() <= 1 and np.count_nonzero(difference) <= 0.002 * difference.size


def test_pmap_equals_jit(finished: Path, runs, tmp_path: Path):
    runs.finish(tmp_path, "--config.parallel.mode=pmap", "--config.eval.methods=()", devices=8)
    assert_same_losses(tmp_path, finished)


def test_an_impossible_mesh_says_what_fits(runs, tmp_path: Path):
    _, errors = runs.finish(tmp_path / "w", "--config.parallel.fsdp=3", devices=8, expect=2)
    assert "does not use the 8 device(s) exactly. What fits" in errors
    assert not (tmp_path / "w").exists()
