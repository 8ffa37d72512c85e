"""`--mode=evaluate`, and the end of training: Fréchet distances and noise shift of several methods, and the report.

All methods use the same noise and labels. A finished evaluation is kept: the same conditions read it back, other
conditions under the same name are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from typing import Any

import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.config import Config, to_dict
from nag_jax.data.images import to_float
from nag_jax.denoiser import Params
from nag_jax.errors import UserError
from nag_jax.figures import sample_grid
from nag_jax.jobs import features
from nag_jax.jobs.drawing import Drawn, draw, sample_labels
from nag_jax.jobs.estimators import Measuring, prepare_guiding, prepare_measuring
from nag_jax.jobs.experiment import Experiment, open_trained, sampling_conditions
from nag_jax.jobs.methods import Method, make_method
from nag_jax.metrics.features import FeatureNet
from nag_jax.metrics.features import features as extract_features
from nag_jax.metrics.frechet import bootstrap_interval, frechet_distance_from_features, paired_bootstrap_difference
from nag_jax.noise_shift.figure import noise_shift_figure
from nag_jax.noise_shift.measurement import NoiseShift, compare_answers
from nag_jax.report import write_report

GRID_IMAGES_PER_CLASS = 8


def run(config: Config, workdir: epath.Path, checkpoint: epath.Path) -> epath.Path:
    """Evaluates a trained network and returns the path of the report."""
    experiment, params, step = open_trained(config, workdir, checkpoint)
    if not (workdir / "config.json").exists():
        storage.write_json(workdir / "config.json", to_dict(config))
    return evaluate_and_report(experiment, params, step=step)


def evaluate_and_report(experiment: Experiment, params: Params, *, step: int) -> epath.Path:
    """Trains (or reads back) the estimator, evaluates with the noise shift, and writes the report.

    Without `eval.methods` there is the report of the training alone.
    """
    if not experiment.config.eval.methods:
        return write_report(experiment.workdir)
    placed = experiment.place(params)
    measuring = prepare_measuring(experiment, placed)
    evaluate(experiment, placed, step=step, measuring=measuring)
    return write_report(experiment.workdir)


def make_methods(config: Config) -> dict[str, Method]:
    """The methods that `eval.methods` names."""
    return {name: make_method(name, config.sampling) for name in config.eval.methods}


def evaluate(
    experiment: Experiment, params: Params, *, step: int, measuring: Measuring | None = None
) -> epath.Path:
    """Evaluates every method of `eval.methods` at one checkpoint.

    Args:
        experiment: config, data and devices.
        params: the network's parameters, on the devices.
        step: training step of the parameters.
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
    guiding = prepare_guiding(experiment, params, methods)
    conditions = (
        {"step": step}
        | measuring_conditions(experiment, feature_net, measuring)
        | sampling_conditions(experiment, methods)
    )
    folder = experiment.workdir / "eval" / f"step_{step}" / folder_name(config, conditions)
    if is_finished(folder, conditions):
        return folder

    start = time.perf_counter()
    drawn = draw(
        experiment,
        experiment.description.denoiser(params),
        methods,
        measuring=measuring.estimator if measuring else None,
        guiding=guiding,
    )
    sampled = time.perf_counter()
    metrics = measure_distances(experiment, methods, drawn, feature_net, accuracy)
    shifts = measure_shifts(experiment, drawn, measuring) if measuring else None

    storage.write_json(folder / "conditions.json", conditions)
    storage.write_bytes(folder / "samples.png", grid(experiment, drawn))
    if config.eval.save_samples:
        storage.write_bytes(folder / "samples.npz", pack_samples(drawn, sample_labels(experiment)))
    if shifts is not None:
        storage.write_json(folder / "noise_shift.json", shifts_to_json(shifts))
        storage.write_bytes(folder / "noise_shift.png", noise_shift_figure(shifts))
    # Written last: a folder with metrics.json is a finished evaluation.
    storage.write_json(folder / "metrics.json", metrics)
    measured = time.perf_counter()
    experiment.add_seconds(**{"sampling": sampled - start, "distances and noise shift": measured - sampled})
    return folder


def measuring_conditions(
    experiment: Experiment, feature_net: FeatureNet, measuring: Measuring | None
) -> dict[str, Any]:
    """All that distances and noise shifts depend on besides the samples."""
    config = experiment.config
    return {
        "features": {"name": feature_net.name, "fingerprint": feature_net.fingerprint},
        "reference": experiment.eval_source.fingerprint,
        "num_reference": len(experiment.eval_arrays[0]),
        "num_resamples": config.eval.num_resamples,
        "noise_shift": (to_dict(config.noise_shift) | {"estimator": measuring.fingerprint}) if measuring else None,
    }


def folder_name(config: Config, conditions: dict[str, Any]) -> str:
    """`eval.name`, or a readable digest of the conditions."""
    if config.eval.name:
        return config.eval.name
    digest = hashlib.sha256(json.dumps(comparable(conditions), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.sampling.stepper}-{config.sampling.num_steps}-n{config.eval.num_samples}-{digest}"


def comparable(conditions: dict[str, Any]) -> dict[str, Any]:
    """The conditions without the commit, and the config's digest, for the keys that matter are listed one by one."""
    return storage.as_json({key: value for key, value in conditions.items() if key not in ("config", "commit")})


def is_finished(folder: epath.Path, conditions: dict[str, Any], last_file: str = "metrics.json") -> bool:
    """Whether `folder` holds this result: its last file is there. Raises UserError if it has other conditions."""
    if not (folder / "conditions.json").exists():
        return False
    stored, wanted = comparable(storage.read_json(folder / "conditions.json")), comparable(conditions)
    differing = [key for key in wanted if stored.get(key) != wanted[key]]
    if differing:
        raise UserError(
            f"{folder} holds results under other conditions: {', '.join(differing)} differ. "
            "Choose another config.eval.name, or leave it empty."
        )
    return (folder / last_file).exists()


def measure_distances(
    experiment: Experiment,
    methods: dict[str, Method],
    drawn: dict[str, Drawn],
    feature_net: FeatureNet,
    accuracy: float | None,
) -> dict[str, Any]:
    """The content of metrics.json: Fréchet distances with bootstrap intervals, beside the real-against-real floor."""
    config = experiment.config
    bootstrap = {"num_resamples": config.eval.num_resamples, "seed": config.eval.seed}
    reference = extract_features(feature_net, experiment.eval_arrays[0])
    # As many training images as samples, for a Fréchet distance depends on the counts.
    real = extract_features(feature_net, experiment.train_arrays[0][: config.eval.num_samples])
    sampled = {name: extract_features(feature_net, to_float(each.images)) for name, each in drawn.items()}
    results: dict[str, Any] = {}
    for name, vectors in sampled.items():
        results[name] = {
            "guidance": methods[name].text,
            "frechet_distance": frechet_distance_from_features(vectors, reference),
            "interval": bootstrap_interval(vectors, reference, **bootstrap),
            "evaluations_per_image": drawn[name].evaluations_per_image,
            "seconds": drawn[name].seconds,
        }
        if name != "plain" and "plain" in sampled:
            plain = sampled["plain"]
            results[name]["difference_to_plain"] = {
                "value": results[name]["frechet_distance"] - frechet_distance_from_features(plain, reference),
                "interval": paired_bootstrap_difference(vectors, plain, reference, **bootstrap),
            }
    return {
        "methods": results,
        "floor": {
            "frechet_distance": frechet_distance_from_features(real, reference),
            "interval": bootstrap_interval(real, reference, **bootstrap),
            "description": "training images against held-out images; the features were fitted on the training images",
            "num_a": len(real),
            "num_b": len(reference),
        },
        "features": {
            "name": feature_net.name,
            "label": feature_net.distance_label,
            "held_out_accuracy": accuracy,
            "dimension": feature_net.dimension,
        },
        "num_samples": config.eval.num_samples,
        "num_reference": len(reference),
    }


def measure_shifts(experiment: Experiment, drawn: dict[str, Drawn], measuring: Measuring) -> dict[str, NoiseShift]:
    """The noise shift of every method against held-out forward states at the same times."""
    times = next(iter(drawn.values())).times
    forward = measuring.forward(experiment, times)
    config = experiment.config
    return {
        name: compare_answers(
            times,
            each.answers,
            forward,
            measuring.calibration,
            seed=config.eval.seed,
            num_resamples=config.eval.num_resamples,
        )
        for name, each in drawn.items()
        if each.answers is not None
    }


def shifts_to_json(shifts: dict[str, NoiseShift]) -> dict[str, Any]:
    """The content of noise_shift.json."""
    return {"methods": {name: shift.to_json() for name, shift in shifts.items()}}


def grid(experiment: Experiment, drawn: dict[str, Drawn]) -> bytes:
    """samples.png: every method's samples by class."""
    labels = sample_labels(experiment)
    return sample_grid(
        {name: (each.images, labels) for name, each in drawn.items()},
        num_classes=experiment.description.num_classes,
        per_class=GRID_IMAGES_PER_CLASS,
    )


def pack_samples(drawn: dict[str, Drawn], labels: np.ndarray) -> bytes:
    """samples.npz: uint8 [N, H, W, C] under each method's name, and the labels."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: each.images for name, each in drawn.items()}
    np.savez_compressed(buffer, labels=labels, **arrays)
    return buffer.getvalue()
