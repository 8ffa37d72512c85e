"""`--mode=evaluate`, and the end of training: distances and noise shift of several methods, and the report.

All methods use the same noise and labels. A killed evaluation goes on from its last batch of samples. A finished one is
kept: the same conditions read it back, other conditions under the same name are refused.
"""

from __future__ import annotations

import os
import time

from etils import epath

from nag_jax import storage
from nag_jax.config import Config, to_dict
from nag_jax.hosts import check_shared, from_first, is_first
from nag_jax.jobs import results
from nag_jax.jobs.drawing import draw
from nag_jax.jobs.estimators import Measuring, prepare_guiding, prepare_measuring
from nag_jax.jobs.experiment import Experiment, TrainedNetwork, open_trained
from nag_jax.jobs.methods import Method, make_method
from nag_jax.metrics.curve_figure import curve_figure
from nag_jax.noise_shift.figure import noise_shift_figure
from nag_jax.report import write_report


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Evaluates a trained network and returns the path of the report."""
    methods = make_methods(config)
    experiment, network = open_trained(config, workdir, checkpoint, methods, needs_data=needs_data(config))
    if is_first() and not (workdir / "config.json").exists():
        storage.write_json(workdir / "config.json", to_dict(config))
    check_shared(workdir / "config.json")
    return evaluate_and_report(experiment, network)


def needs_data(config: Config) -> bool:
    """Whether an evaluation looks at the network's own data, whatever its methods are."""
    return bool(config.noise_shift.times) or not config.eval.reference


def evaluate_and_report(experiment: Experiment, network: TrainedNetwork) -> epath.Path:
    """Trains (or reads back) the estimator, evaluates with the noise shift, and writes the report.

    Without `eval.methods` there is the report of the training alone.
    """
    if not experiment.config.eval.methods:
        return report(experiment)
    measuring = prepare_measuring(experiment, network) if experiment.config.noise_shift.times else None
    folder = evaluate(experiment, network, measuring=measuring)
    return report(experiment, folder)


def report(experiment: Experiment, evaluation: epath.Path | None = None) -> epath.Path:
    """Writes the report, with the newest evaluation if none is given; returns its path."""
    return epath.Path(from_first(lambda: os.fspath(write_report(experiment.workdir, evaluation))))


def make_methods(config: Config) -> dict[str, Method]:
    """The methods that `eval.methods` names."""
    return {name: make_method(name, config.sampling) for name in config.eval.methods}


def evaluate(experiment: Experiment, network: TrainedNetwork, *, measuring: Measuring | None = None) -> epath.Path:
    """Evaluates every method of `eval.methods`.

    Args:
        experiment: config, data and devices.
        network: what is evaluated.
        measuring: the estimator that measures, with its calibration; without it the noise shift is left out.

    Returns:
        The folder eval/step_N/NAME with conditions.json, metrics.json, samples.png, curve.png of the distances over the
        number of samples, (with `eval.save_samples`) the samples, and (with an estimator) noise_shift.json and
        noise_shift.png.

    Raises:
        UserError: the folder holds an evaluation under other conditions.
    """
    config = experiment.config
    methods = make_methods(config)
    judge = results.prepare_judge(experiment)
    guiding = prepare_guiding(experiment, network, methods)
    conditions = results.sampling_conditions(experiment, network, methods, guiding)
    conditions |= results.measuring_conditions(experiment, judge, measuring)
    if config.eval.save_samples:  # what is kept of the samples differs, and so must the folder
        conditions["save_samples"] = True
    folder = experiment.workdir / "eval" / f"step_{network.step}" / results.folder_name(config, conditions)
    if results.is_finished(folder, conditions, last_file="metrics.json"):
        return folder

    conditions = results.begin(folder, conditions)
    drawn = draw(
        experiment,
        network,
        methods,
        folder / results.BLOCKS,
        feature_net=judge.feature_net,
        measuring=measuring.estimator if measuring else None,
        guiding=guiding,
        keep_images=config.eval.save_samples,
    )
    start = time.perf_counter()
    metrics, curves = results.measure_distances(experiment, methods, drawn, judge, folder)
    shifts = results.measure_shifts(experiment, drawn, measuring) if measuring else {}
    if is_first():
        results.write_pictures(experiment, drawn, folder)
        if curves:
            storage.write_bytes(folder / "curve.png", curve_figure(curves, judge.feature_net.distance_label))
        if config.eval.save_samples:
            results.write_samples(experiment, drawn, folder)
        if measuring is not None:
            storage.write_json(folder / "noise_shift.json", results.shifts_to_json(experiment, shifts, measuring))
            storage.write_bytes(folder / "noise_shift.png", noise_shift_figure(shifts))
        experiment.add_to_environment("evaluation")
        sampling = sum(each.seconds for each in drawn.values())
        experiment.add_seconds(sampling=sampling, **{"distances and noise shift": time.perf_counter() - start})
        # Written last: a folder with metrics.json is a finished evaluation.
        storage.write_json(folder / "metrics.json", metrics | {"conditions": conditions})
    results.finish(folder)
    return folder
