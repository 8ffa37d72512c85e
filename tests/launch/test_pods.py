"""docs/pods.md: its hours are those of the planner's table, and its settings are those of the scripts and configs."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

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


def test_its_links_and_scripts_exist():
    for name in re.findall(r"\]\(([\w./]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name
    for name in set(re.findall(r"launch/[\w.]+\w", TEXT)) | set(re.findall(r"tests/[\w/]+\.py", TEXT)):
        assert (ROOT / name).exists(), name


def test_its_variables_are_read_by_the_script():
    script = (ROOT / "launch/tpu_pod.sh").read_text()
    for name in re.findall(r"\b(TPU_POD_\w+|CLOUDSDK_\w+)=", TEXT):
        assert f"${{{name}:-" in script, name
