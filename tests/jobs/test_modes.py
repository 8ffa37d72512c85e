"""The other modes on a finished run, and the library on its folder."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

import nag_jax
from nag_jax.errors import UserError

FLAG = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # for GPUs; a CPU does not look at it
FEW = ["--config.eval.num_samples=50", "--config.sampling.num_steps=2"]


def folder_of(output: str, word: str) -> Path:
    (line,) = [line for line in output.splitlines() if line.startswith(f"{word}: ")]
    return Path(line.removeprefix(f"{word}: "))


def test_sample_writes_pictures_arrays_and_conditions(
    finished: Path, runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A hardly trained network needs a large weight for one byte of an image to change.
    arguments = [
        "--mode=sample",
        f"--checkpoint={finished}",
        "--config.eval.methods=('plain','nag','classifier_nag')",
        "--config.sampling.weights=params",
        "--config.sampling.nag_scale=300",
    ]
    monkeypatch.setenv(*FLAG)
    output, _ = runs.finish(tmp_path / "w", *arguments, *FEW)
    folder = folder_of(output, "written")
    assert folder.parent == tmp_path / "w" / "samples"
    images = {}
    for method in ("plain", "nag", "classifier_nag"):
        with np.load(folder / f"samples-{method}.npz") as samples:
            assert samples.files == ["arr_0", "arr_1"]
            images[method] = samples["arr_0"]
            assert np.bincount(samples["arr_1"], minlength=10).tolist() == [5] * 10
        assert images[method].shape == (50, 8, 8, 1) and images[method].dtype == np.uint8
    assert not np.array_equal(images["plain"], images["nag"])
    assert not np.array_equal(images["plain"], images["classifier_nag"])
    assert not (folder / "blocks").exists()
    conditions = json.loads((folder / "conditions.json").read_text())
    assert conditions["sampling"]["num_steps"] == 2 and conditions["step"] == 6
    assert conditions["compiler_flags"].items() >= {FLAG}
    # The estimator that guides is another one than the one that measures.
    assert {path.name for path in (tmp_path / "w" / "estimator").iterdir()} == {"guide.json", "guide.npz"}


def test_samples_after_kill_9_are_those_of_an_undisturbed_run(finished: Path, runs, tmp_path: Path):
    arguments = ["--mode=sample", f"--checkpoint={finished}", "--config.eval.methods=('nag',)", *FEW]
    arguments += ["--config.eval.name=mine", "--config.sampling.batch_size=2"]
    arguments += ["--config.sampling.stepper=euler_maruyama"]
    runs.finish(tmp_path / "whole", *arguments)
    blocks = tmp_path / "broken" / "samples" / "mine" / "blocks" / "nag"
    runs.interrupt(tmp_path / "broken", signal.SIGKILL, lambda: len(list(blocks.glob("*.npz"))) >= 2, *arguments)
    assert not (tmp_path / "broken" / "samples" / "mine" / "samples.npz").exists()
    runs.finish(tmp_path / "broken", *arguments)
    whole, broken = (np.load(tmp_path / name / "samples" / "mine" / "samples.npz") for name in ("whole", "broken"))
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(broken[name], whole[name])
    assert not blocks.exists()


def test_evaluate_into_another_folder_and_a_taken_name(finished: Path, runs, tmp_path: Path):
    arguments = ["--mode=evaluate", f"--checkpoint={finished}", "--config.eval.name=mine", *FEW]
    arguments.append("--config.eval.methods=('plain','nag')")
    output, _ = runs.finish(tmp_path, *arguments)
    assert folder_of(output, "report").exists()
    metrics = tmp_path / "eval" / "step_6" / "mine" / "metrics.json"
    assert set(json.loads(metrics.read_text())["methods"]) == {"plain", "nag"}
    before = metrics.read_bytes()
    _, errors = runs.finish(tmp_path, *arguments, "--config.sampling.nag_scale=3", expect=2)
    assert "holds results under other conditions: methods, sampling differ" in errors
    assert metrics.read_bytes() == before


def test_noise_shift_measures_against_the_forward_control(
    finished: Path, runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(*FLAG)
    arguments = ["--mode=noise_shift", f"--checkpoint={finished}", *FEW, "--config.sampling.num_steps=4"]
    output, _ = runs.finish(tmp_path, *arguments, "--config.eval.methods=('plain','nag')")
    folder = folder_of(output, "written")
    assert json.loads((folder / "conditions.json").read_text())["compiler_flags"].items() >= {FLAG}
    shifts = json.loads((folder / "noise_shift.json").read_text())["methods"]
    for shift in shifts.values():
        for at_time in shift["shifts"]:
            sampled, forward = at_time["sampled_answer"]["estimate"], at_time["forward_answer"]["estimate"]
            assert at_time["raw_shift"]["estimate"] == pytest.approx(sampled - forward)
    assert (folder / "noise_shift.png").read_bytes().startswith(b"\x89PNG")


def test_the_library_loads_samples_and_measures(finished: Path):
    denoiser = nag_jax.load(finished)
    samples = nag_jax.sample(
        denoiser, np.arange(10), seed=0, num_steps=3, guidance=nag_jax.guidance.cfg(1.5) + nag_jax.guidance.nag(1.0)
    )
    assert samples.x.shape == (10, 8, 8, 1) and samples.evaluations_per_image == 9
    images = nag_jax.to_uint8(np.asarray(samples.x))
    assert images.dtype == np.uint8
    raw = nag_jax.load(finished, weights="params")
    plain, trained = (nag_jax.sample(d, np.arange(4), seed=0, num_steps=2).x for d in (denoiser, raw))
    assert not np.array_equal(plain, trained)


def test_loading_says_what_is_missing(finished: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no folder of a trained network"):
        nag_jax.load(tmp_path)
    with pytest.raises(UserError, match="no parameters 'long'. It has: ema, params"):
        nag_jax.load(finished, weights="long")


@pytest.mark.parametrize("options", [pytest.param("smoke", marks=pytest.mark.slow), "dit_xl2,nag,smoke"])
def test_imagenet_smoke_runs_the_same_code(runs, tmp_path: Path, options: str):
    output, _ = runs.finish(tmp_path, f"--config=configs/imagenet256.py:{options}")
    report = folder_of(output, "report").read_text()
    assert "imagenet2012" in report and "mock" in report
    (metrics,) = (tmp_path / "eval" / "step_4").glob("*/metrics.json")
    evaluations = {
        name: method["evaluations_per_image"] for name, method in json.loads(metrics.read_text())["methods"].items()
    }
    with_nag = {"nag": 8, "cfg+nag": 12} if "nag" in options else {}
    assert evaluations == {"plain": 4, "cfg": 8} | with_nag


def test_results_of_another_run_do_not_go_into_a_training_folder(finished: Path, runs, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    _, errors = runs.finish(tmp_path, "--mode=sample", f"--checkpoint={finished}", expect=2)
    assert "holds a training run of its own" in errors


def test_a_checkpoint_of_other_data_is_refused(finished: Path, runs, tmp_path: Path):
    arguments = ["--mode=evaluate", f"--checkpoint={finished}", "--config=configs/imagenet256.py:smoke"]
    _, errors = runs.finish(tmp_path / "w", *arguments, expect=2)
    assert "works on states of shape (8, 8, 1) of 10 classes, but the data are imagenet2012" in errors
    assert not (tmp_path / "w").exists()
