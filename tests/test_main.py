"""The command line: help, wrong flags, wrong files, dry run. Nothing here trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nag_jax import main

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nag_jax.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)


def test_help_says_what_it_does_and_how():
    result = run("--help")
    assert "python -m nag_jax.main --mode=sample" in result.stdout
    for flag in ("--config", "--workdir", "--mode", "--checkpoint", "--[no]dry_run", "--[no]debug"):
        assert flag in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.sampling.nag_scal=2"], "config.sampling.nag_scal is not a key of this config. Nearest: "),
        (["--wrkdir=x"], "Unknown flag --wrkdir. Nearest: --workdir"),
        (["--config=configs/none.py"], "There is no config file configs/none.py. Known: configs/digits.py"),
        (["--config=configs/digits.py:smok"], "'smok' is not an option of this config. Nearest: smoke"),
        (["--mode=fly"], "fly"),
        (["digits"], "Unknown argument 'digits'"),
        (["--checkpoint=x"], "--checkpoint is for other modes"),
        (["--config.eval.methods=('nagg',)", "--dry_run"], "'nagg', which is not a method"),
        (["--config.model.patch_size=3", "--dry_run"], "does not divide"),
        (["--config.sampling.stepper=eulr", "--dry_run"], "'eulr' is not a stepper"),
        (["--config.objective.noise_dropout=0.0", "--dry_run"], "was not trained with noise-condition dropout"),
        (["--config.objective.prediction=noise", "--dry_run"], "a noise prediction does not determine the velocity"),
        (["--mode=encode"], "--mode=encode has no --checkpoint and no --workdir"),
        (["--config", "configs/none.py"], "There is no config file configs/none.py"),
        (["--config.batch_size=0.5"], "batch_size"),
        (["--mode=evaluate", "--checkpoint=nowhere"], "nowhere is no folder of a network"),
    ],
)
def test_a_users_mistake_gives_one_sentence_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path):
    result = run(*arguments, f"--workdir={tmp_path / 'w'}")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
    assert not (tmp_path / "w").exists()


def test_debug_shows_the_traceback(tmp_path: Path):
    result = run("--debug", "--dry_run", "--config.model.patch_size=3", f"--workdir={tmp_path}")
    assert "Traceback" in result.stderr


def test_a_dry_run_describes_and_writes_nothing(tmp_path: Path):
    result = run("--dry_run", "--config=configs/digits.py:smoke", "--config.num_steps=9", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert '"num_steps": 9' in result.stdout
    assert "training      9 steps of 16" in result.stdout
    assert "runs/digits-smoke" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "workdir"),
    [
        ("configs/digits.py", "runs/digits"),
        ("a/imagenet256.py:sit_xl2,nag", "runs/imagenet256-sit_xl2-nag"),
    ],
)
def test_default_work_folder(config: str, workdir: str):
    assert main.default_workdir(config) == workdir


def test_import_of_the_package_is_light():
    code = "import sys, nag_jax; print([m for m in ('jax', 'flax', 'tensorflow_datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout.strip() == "[]"


def test_a_missing_client_of_an_object_store_is_named(capsys: pytest.CaptureFixture[str]):
    assert main.exit_code(ImportError("Please install gcsfs to access Google Storage")) == 2
    assert "pip install -e '.[gcs]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match="another"):
        main.exit_code(ImportError("another"))
