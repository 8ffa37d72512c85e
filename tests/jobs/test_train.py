"""The main job end to end: what it writes, that it resumes bit for bit after any interruption, what it refuses."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config, LogConfig, from_config_dict
from nag_jax.errors import TrainingDivergedError, UserError
from nag_jax.jobs import train
from nag_jax.metric_writer import read_metrics

# A run that takes a few seconds of steps, long enough to be interrupted, and evaluates nothing.
LONG = ["--config.num_steps=400", "--config.checkpoint.every_steps=40", "--config.log.every_steps=10"]
TRAIN_ONLY = [*LONG, "--config.eval.methods=()", "--config.optimizer.learning_rate=0.001"]


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path: parameters, their average, optimizer state and step."""
    arrays: dict[str, np.ndarray] = {}
    for name in ("params", "ema", "training"):
        tree = ocp.PyTreeCheckpointer().restore((workdir / "checkpoints" / str(step) / name).absolute())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[f"{name}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return arrays


def losses(workdir: Path) -> list[dict[str, float]]:
    of_speed = ("examples_per_second", "goodput")
    return [{k: v for k, v in line.items() if k not in of_speed} for line in read_metrics(workdir)]


def test_a_finished_run_has_everything(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.json",
        "model.json",
        "environment.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "estimator",
        "features",
        "eval",
        "report.html",
    }
    (folder,) = (finished / "eval" / "step_6").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "conditions.json",
        "metrics.json",
        "samples.png",
        "noise_shift.json",
        "noise_shift.png",
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["methods"]) == {"plain", "cfg", "nag", "cfg+nag"}
    # Heun with 3 steps makes 5 evaluations of each branch.
    evaluations = {name: method["evaluations_per_image"] for name, method in metrics["methods"].items()}
    assert evaluations == {"plain": 5, "cfg": 10, "nag": 10, "cfg+nag": 15}
    for method in metrics["methods"].values():
        low, high = method["interval"]
        assert 0.0 <= low <= high and np.isfinite(method["frechet_distance"])


def test_the_attention_is_recorded_with_the_run_and_among_the_conditions(finished: Path):
    recorded = json.loads((finished / "environment.json").read_text())["attention"]
    assert {place: record["name"] for place, record in recorded.items()} == {
        "training on cpu": "xla",
        "sampling on cpu": "xla",
    }
    (conditions,) = (finished / "eval" / "step_6").glob("*/conditions.json")
    assert json.loads(conditions.read_text())["attention"] == "xla"
    # A network may be used on other devices than it was trained on.
    assert json.loads((finished / "model.json").read_text())["model"]["attention"] == "auto"


def test_an_attention_that_this_machine_does_not_have_is_refused_before_anything(runs, tmp_path: Path):
    half = "--config.model.dtype=bfloat16"
    _, errors = runs.finish(tmp_path / "w", "--config.model.attention=cudnn", half, expect=2)
    assert "model.attention = 'cudnn' needs an NVIDIA GPU" in errors and "Traceback" not in errors
    assert not (tmp_path / "w").exists()


def test_metrics_record_both_dropouts_and_loss_by_level(finished: Path):
    (last,) = [line for line in read_metrics(finished) if line["step"] == 6]
    assert {"dropped/label", "dropped/noise", "loss/noise_kept", "grad_norm", "learning_rate"} <= set(last)
    assert any(name.startswith("loss_by_level/") for name in last)


def test_a_finished_folder_rebuilds_its_report_and_nothing_else(finished: Path, runs):
    report = finished / "report.html"
    folders = ("eval", "estimator", "features", "checkpoints")
    results = [path for folder in folders for path in (finished / folder).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in results if path.is_file()}
    content = report.read_bytes()
    report.unlink()
    runs.finish(finished)
    assert report.read_bytes() == content
    assert len(before) > 10 and {path: path.stat().st_mtime_ns for path in before} == before


def test_another_configuration_is_refused_and_nothing_is_touched(finished: Path, runs):
    config = (finished / "config.json").read_bytes()
    _, errors = runs.finish(finished, "--config.model.depth=2", "--config.seed=5", expect=2)
    assert "model.depth was 1, is 2; seed was 0, is 5" in errors and "Traceback" not in errors
    assert (finished / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__accumulation_steps": 3}, "batch of 16 .* optimizer.accumulation_steps = 3.* such as 15 or 18"),
        ({"model__patch_size": 3}, "model.patch_size = 3 does not divide"),
        ({"objective__learn_variance": True}, "objective.learn_variance needs"),
        ({"optimizer__schedule": "cosine", "optimizer__warmup_steps": 500}, "optimizer.warmup_steps = 500 leaves none"),
    ],
)
def test_what_the_step_would_refuse_is_refused_before_anything_is_written(
    runs, tmp_path: Path, changes: dict[str, object], message: str
):
    config = tiny_config(batch_size=16, data__data_dir=str(runs.data_dir), **changes)
    with pytest.raises(UserError, match=message):
        train.run(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_interrupted_by_ctrl_c_sigterm_and_kill_it_ends_as_if_never_interrupted(runs, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.finish(whole, *TRAIN_ONLY)

    def reached(step: int):
        return lambda: any(line["step"] >= step for line in read_metrics(broken))

    def saved(step: int):
        return lambda: (broken / "checkpoints" / str(step)).is_dir()

    said = runs.interrupt(broken, signal.SIGINT, reached(20), *TRAIN_ONLY)
    assert "Stopped at step" in said and "Traceback" not in said
    stopped_at = max(line["step"] for line in read_metrics(broken))
    assert (broken / "checkpoints" / str(stopped_at)).is_dir()
    said = runs.interrupt(broken, signal.SIGTERM, reached(stopped_at + 20), *TRAIN_ONLY)
    assert "Stopped at step" in said
    stopped_at = max(line["step"] for line in read_metrics(broken))
    next_save = 40 * (stopped_at // 40 + 2)
    runs.interrupt(broken, signal.SIGKILL, saved(next_save), *TRAIN_ONLY)
    runs.finish(broken, *TRAIN_ONLY)

    expected, found = saved_arrays(whole, 400), saved_arrays(broken, 400)
    assert expected.keys() == found.keys() and len(expected) > 50
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    by_step = {line["step"]: line for line in losses(whole)}
    shared = [line for line in losses(broken) if line["step"] in by_step]
    assert len(shared) >= 30
    # A line averages the steps since the last one; those that begin at an interruption average fewer.
    for before, line in itertools.pairwise(losses(broken)):
        if line["step"] - before["step"] == 10:
            assert line == by_step[line["step"]]


def tiny_config(**changes: object) -> Config:
    root = Path(__file__).resolve().parent.parent.parent
    config = runpy.run_path(str(root / "configs" / "digits.py"))["get_config"]("smoke")
    config.eval.methods = ()
    with config.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            target = config[section] if section else config
            target[name] = value
    return from_config_dict(config)


def test_a_run_goes_on_with_steps_computed_in_another_way(finished: Path, runs, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    changes = {"model__remat": "full", "optimizer__accumulation_steps": 2}
    train.run(tiny_config(data__data_dir=str(runs.data_dir), **changes), epath.Path(tmp_path / "run"))
    expected, found = saved_arrays(finished, 6), saved_arrays(tmp_path / "run", 6)
    assert expected.keys() == found.keys()
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=1e-4, atol=1e-5, err_msg=path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["remat"] == "full" and config["optimizer"]["accumulation_steps"] == 2


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(
    runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, data__data_dir=str(runs.data_dir))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(TrainingDivergedError, match=r"The \w+ of step \d+ is (nan|inf).*checkpoint"):
        train.run(config, epath.Path(tmp_path / "run"))
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["training"]["compiler_flags"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    # Nothing that is not finite was saved.
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        for step in checkpoints.steps():
            for leaf in jax.tree.leaves(checkpoints.restore_params("params", step)):
                assert np.isfinite(leaf).all()


def test_the_first_step_that_is_not_finite_is_named(tmp_path: Path):
    class NoCheckpoints:
        directory = tmp_path

        def wait(self) -> None:
            pass

        def latest_step(self) -> int | None:
            return 30

    def metrics(loss: float, grad_norm: float) -> dict[str, object]:
        return {"loss": loss, "grad_norm": grad_norm, "param_norm": 1.0, "buckets": {"count": np.ones((2, 2, 1))}}

    steps = [metrics(1.0, 1.0), metrics(1.0, float("inf")), metrics(float("nan"), 1.0)]
    message = "The grad_norm of step 39 is inf. The last good checkpoint is step 30"
    with pytest.raises(TrainingDivergedError, match=message):
        train.read_metrics(steps, last_step=40, checkpoints=NoCheckpoints())  # type: ignore[arg-type]


def test_scheduled_evaluations_come_during_training(runs, tmp_path: Path):
    arguments = ["--config.eval.every_steps=3", "--config.eval.methods=('plain',)"]
    runs.finish(tmp_path, *arguments)
    folders = sorted(path.name for path in (tmp_path / "eval").iterdir())
    assert folders == ["step_3", "step_6"]
    (early,) = (tmp_path / "eval" / "step_3").iterdir()
    # Scheduled evaluations leave out the noise shift: the estimator belongs to the final network.
    assert not (early / "noise_shift.json").exists() and (early / "metrics.json").exists()


def test_steps_that_run_together_are_the_same_steps_and_can_be_traced(finished: Path, runs, tmp_path: Path):
    arguments = ["--config.parallel.steps_per_dispatch=2", "--config.checkpoint.every_steps=2"]
    runs.finish(tmp_path, *arguments, "--config.eval.methods=()", "--config.log.profile_steps=(3,3)")
    expected, found = saved_arrays(finished, 6), saved_arrays(tmp_path, 6)
    assert expected.keys() == found.keys()
    for path, values in expected.items():
        np.testing.assert_allclose(found[path], values, rtol=1e-5, atol=1e-6, err_msg=path)
    losses_by_step = {line["step"]: line["loss"] for line in read_metrics(finished)}
    for line in read_metrics(tmp_path):
        assert 0.0 <= line["goodput"] <= 1.0
        if line["step"] != 4:  # whose line is of the steps 3 and 4 here, and of 4 alone there
            assert line["loss"] == pytest.approx(losses_by_step[line["step"]], rel=1e-5)
    assert list((tmp_path / "profile").rglob("*.xplane.pb")), "a trace was asked for"
    with pytest.raises(UserError, match="num_steps = 6 and log.every_steps = 2 .* multiple of it"):
        tiny_config(parallel__steps_per_dispatch=4)
    longer = {"num_steps": 8, "log__every_steps": 4, "checkpoint__every_steps": 4, "parallel__steps_per_dispatch": 4}
    with pytest.raises(UserError, match="stands at step 6, no multiple of parallel.steps_per_dispatch = 4"):
        train.open_run(tiny_config(data__data_dir=str(runs.data_dir), **longer), epath.Path(tmp_path))


@pytest.mark.parametrize("steps", [(3,), (4, 3), (0, 2)])
def test_a_trace_of_no_steps_is_refused(steps: tuple[int, ...]):
    with pytest.raises(UserError, match="log.profile_steps"):
        LogConfig(profile_steps=steps)
