"""docs/pods.md: its hours are those of the planner's table, and its settings are those of the scripts and configs."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from nag_jax import flops
from nag_jax.models.vae import VaeConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/pods.md").read_text()
CELLS = json.loads((ROOT / "results/plan_tpu.json").read_text())["cells"]


def config(options: str) -> Any:
    return runpy.run_path(str(ROOT / "configs/imagenet256.py"))["get_config"](options)


@pytest.mark.parametrize(("machine", "fsdp"), [("v4-8", 4), ("v5e-16", 16), ("v6e-16", 1), ("v6e-16", 16)])
def test_hours_of_training_are_steps_times_the_roofline_time_of_a_step(machine: str, fsdp: int):
    cell = CELLS[f"training XL/2 {machine} fsdp {fsdp}"]
    tuned, scratch = config("sit_xl2,nag,finetune"), config("sit_xl2,nag")
    assert cell["batch_size"] == tuned.batch_size == scratch.batch_size
    bounds = (cell["roofline"]["seconds"], cell["roofline"]["seconds_without_overlap"])
    hours = [" to ".join(f"{c.num_steps * bound / 3600:.1f}" for bound in bounds) for c in (tuned, scratch)]
    assert f"| {machine} | {fsdp} | {hours[0]} | {hours[1]} |" in TEXT
    assert f"{tuned.num_steps:,} steps" in TEXT and f"{scratch.num_steps:,} steps" in TEXT


def test_hours_of_sampling_are_those_of_eight_evaluations_a_step():
    cell = CELLS["sampling XL/2 v5e-16 fsdp 1"]
    assert cell["batch_size"] == config("sit_xl2").sampling.batch_size
    hours = 50_000 / cell["batch_size"] * cell["roofline"]["seconds"] * 8 / 3 / 3600
    assert f"| {hours:.1f} on v5e-16 (*estimate from below*)" in TEXT
    assert f"{cell['roofline']['seconds']:.1f} s at best for 64 images" in TEXT


def test_minutes_lost_to_a_stop_are_those_between_two_checkpoints():
    line, every = CELLS["training XL/2 v5e-16 fsdp 16"]["roofline"], config("sit_xl2,nag").checkpoint.every_steps
    least, most = (every * line[key] / 60 for key in ("seconds", "seconds_without_overlap"))
    assert re.search(rf"\({every:,}\) steps back: {least:.0f} to {most:.0f} minutes", TEXT)


def test_the_commands_have_the_meshes_of_the_tables():
    """Training with fsdp over the sixteen chips; sampling without."""
    training, sampling = (re.search(rf"tpu_pod.sh {job} -- (?:.*\\\n)*.*", TEXT) for job in ("all", "start"))
    assert training is not None and "--config.parallel.fsdp=16" in training[0]
    assert sampling is not None and "--mode=evaluate" in sampling[0] and "fsdp" not in sampling[0]
    assert "fsdp" not in TEXT[TEXT.index("PLACES=") : training.start()]


def test_latents_are_two_orientations_of_both_splits():
    """Float16 means and log-variances of the training images; operations for the 50,000 held-out images too."""
    images = runpy.run_path(str(ROOT / "configs/imagenet256.py"))["TRAINING_IMAGES"]
    operations = 2 * (images + 50_000) * flops.vae_encode(VaeConfig(), 256, 256)
    assert f"latents, {2 * images * 32 * 32 * 8 * 2 / 1e9:.0f} GB of training images" in TEXT
    assert f"both splits are {operations / 1e18:.2f} EFLOP" in TEXT


def test_its_links_and_scripts_exist():
    for name in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name
    for name in set(re.findall(r"launch/[\w.]+\w", TEXT)) | set(re.findall(r"tests/[\w/]+\.py", TEXT)):
        assert (ROOT / name).exists(), name


def test_its_variables_are_read_by_the_script():
    script = (ROOT / "launch/tpu_pod.sh").read_text()
    for name in re.findall(r"\b(TPU_POD_\w+|CLOUDSDK_\w+)=", TEXT):
        assert f"${{{name}:-" in script, name
