"""The benchmark of full-size conversion: slow, at a tiny size and at its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, size: str) -> dict:
    output = folder / "full_size.json"
    command = [sys.executable, "benchmarks/full_size.py", f"--size={size}", f"--output={output}", f"--folder={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def check(result: dict) -> None:
    stages = result["stages"]
    assert stages["compare_files"]["bit_identical"] and stages["compare_vae"]["bit_identical"]
    assert result["peak_gib"] == max(stage["peak_gib"] for stage in stages.values()) <= 20.0


@pytest.mark.slow
def test_every_stage_runs_at_a_tiny_size(tmp_path: Path):
    result = run(tmp_path, "tiny")
    check(result)
    assert not list(tmp_path.glob("tmp*")), "the networks are removed"


@pytest.mark.slow
@pytest.mark.serial
def test_xl2_and_the_sd_vae_within_20_gib(tmp_path: Path):
    result = run(tmp_path, "full")
    check(result)
    assert result["stages"]["make_vae"]["parameters"] == 83_653_863
    assert result["stages"]["make_network"]["parameters"] == 675_129_632


def test_the_published_result_is_of_the_full_size():
    result = json.loads((ROOT / "results/full_size.json").read_text())
    assert result["size"] == "full"
    check(result)
