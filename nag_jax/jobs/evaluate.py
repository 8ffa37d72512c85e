"""`--mode=evaluate`, and the end of training: Fréchet distances and noise shift of several methods, and the report.

All methods use the same noise and labels. A finished evaluation is kept: the same conditions read it back, other
conditions under the same name are refused.
"""

from __future__ import annotations

import time

from etils import epath

from nag_jax import storage
from nag_jax.config import Config, to_dict
from nag_jax.jobs import features, results
from nag_jax.jobs.drawing import draw, sample_labels
from nag_jax.jobs.estimators import Measuring, prepare_guiding, prepare_measuring
from nag_jax.jobs.experiment import Experiment, TrainedNetwork, open_trained
from nag_jax.jobs.methods import Method, make_method
from nag_jax.noise_shift.figure import noise_shift_figure
from nag_jax.report import write_report


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Evaluates a trained network and returns the path of the report."""
    experiment, network = open_trained(config, workdir, checkpoint, make_methods(config), needs_data=True)
    if not (workdir / "config.json").exists():
        storage.write_json(workdir / "config.json", to_dict(config))
    return evaluate_and_report(experiment, network)


def evaluate_and_report(experiment: Experiment, network: TrainedNetwork) -> epath.Path:
    """Trains (or reads back) the estimator, evaluates with the noise shift, and writes the report.

    Without `eval.methods` there is the report of the training alone.
    """
    if not experiment.config.eval.methods:
        return write_report(experiment.workdir)
    measuring = prepare_measuring(experiment, network)
    folder = evaluate(experiment, network, measuring=measuring)
    return write_report(experiment.workdir, folder)


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
        The folder eval/step_N/NAME with conditions.json, metrics.json, samples.png and (with an estimator)
        noise_shift.json and noise_shift.png.

    Raises:
        UserError: the folder holds an evaluation under other conditions.
    """
    config = experiment.config
    methods = make_methods(config)
    feature_net, accuracy = features.prepare(experiment)
    guiding = prepare_guiding(experiment, network, methods)
    conditions = results.sampling_conditions(experiment, network, methods, guiding) | results.measuring_conditions(
        experiment, feature_net, measuring
    )
    folder = experiment.workdir / "eval" / f"step_{network.step}" / results.folder_name(config, conditions)
    if results.is_finished(folder, conditions, last_file="metrics.json"):
        return folder

    start = time.perf_counter()
    drawn = draw(experiment, network, methods, measuring=measuring.estimator if measuring else None, guiding=guiding)
    sampled = time.perf_counter()
    metrics = results.measure_distances(experiment, methods, drawn, feature_net, accuracy)

    storage.write_json(folder / "conditions.json", conditions)
    storage.write_bytes(folder / "samples.png", results.grid(experiment, drawn))
    if config.eval.save_samples:
        storage.write_bytes(folder / "samples.npz", results.pack_samples(drawn, sample_labels(experiment)))
    if measuring is not None:
        shifts = results.measure_shifts(experiment, drawn, measuring)
        storage.write_json(folder / "noise_shift.json", results.shifts_to_json(experiment, shifts, measuring))
        storage.write_bytes(folder / "noise_shift.png", noise_shift_figure(shifts))
    # Written last: a folder with metrics.json is a finished evaluation.
    storage.write_json(folder / "metrics.json", metrics)
    measured = time.perf_counter()
    experiment.add_to_environment("evaluation")
    experiment.add_seconds(**{"sampling": sampled - start, "distances and noise shift": measured - sampled})
    return folder
