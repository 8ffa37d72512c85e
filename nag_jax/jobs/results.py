"""Results of jobs: their folders and conditions, what is measured on drawn samples, and the files it goes into.

A result's folder is finished when its last file is there. The same conditions read it back; other conditions under the
same name are refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.config import Config, to_dict
from nag_jax.data.images import to_float
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.figures import sample_grid
from nag_jax.jobs.drawing import Drawn, sample_labels
from nag_jax.jobs.estimators import Measuring
from nag_jax.jobs.experiment import Experiment, TrainedNetwork, commit, config_digest
from nag_jax.jobs.methods import Method
from nag_jax.metrics.features import FeatureNet
from nag_jax.metrics.features import features as extract_features
from nag_jax.metrics.frechet import bootstrap_interval, frechet_distance_from_features, paired_bootstrap_difference
from nag_jax.noise_shift.difference import shift_differences
from nag_jax.noise_shift.measurement import NoiseShift, compare_answers
from nag_jax.params_hash import params_hash

GRID_IMAGES_PER_CLASS = 8

# What stands among the conditions for information alone: it does not change a number that the others leave equal.
INFORMATION = ("checkpoint", "config", "commit")


def sampling_conditions(
    experiment: Experiment, network: TrainedNetwork, methods: Mapping[str, Method], guiding: Estimator | None
) -> dict[str, Any]:
    """All that samples depend on, and where they come from, to stand beside every number."""
    config, vae = experiment.config, experiment.decoder.vae
    conditions = {
        "step": network.step,
        "network": network.fingerprint,
        "guiding_estimator": None if guiding is None else params_hash(jax.device_get(guiding.params)),
        "methods": {name: method.text for name, method in methods.items()},
        "sampling": to_dict(config.sampling),
        "num_samples": config.eval.num_samples,
        "seed": config.eval.seed,
        "dtype": experiment.description.model.dtype,
        "precision": experiment.description.model.precision,
        "device": jax.devices()[0].device_kind,
        "vae": {"name": vae.name, "fingerprint": vae.fingerprint} if vae else None,
        "checkpoint": str(experiment.network_folder),
        "config": config_digest(config),
        "commit": commit(),
    }
    if any(method.needs_original for method in methods.values()):
        conditions["original_network"] = params_hash(jax.device_get(experiment.original.params))
    if config.sampling.label_rule == "reference":
        conditions["reference"] = experiment.eval_source.fingerprint
    return conditions


def shift_conditions(experiment: Experiment, measuring: Measuring | None) -> dict[str, Any]:
    """All that noise shifts depend on besides the samples."""
    config = experiment.config
    return {
        "training_data": experiment.train_source.fingerprint,
        "reference": experiment.eval_source.fingerprint,
        "num_reference": len(experiment.eval_states[0]),
        "num_resamples": config.eval.num_resamples,
        "noise_shift": (to_dict(config.noise_shift) | {"estimator": measuring.fingerprint}) if measuring else None,
    }


def measuring_conditions(
    experiment: Experiment, feature_net: FeatureNet, measuring: Measuring | None
) -> dict[str, Any]:
    """All that distances and noise shifts depend on besides the samples."""
    return {
        "features": {"name": feature_net.name, "fingerprint": feature_net.fingerprint}
    } | shift_conditions(experiment, measuring)


def folder_name(config: Config, conditions: dict[str, Any]) -> str:
    """`eval.name`, or a readable digest of the conditions."""
    if config.eval.name:
        return config.eval.name
    digest = hashlib.sha256(json.dumps(comparable(conditions), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.sampling.stepper}-{config.sampling.num_steps}-n{config.eval.num_samples}-{digest}"


def comparable(conditions: dict[str, Any]) -> dict[str, Any]:
    """The conditions that decide the numbers, as JSON holds them."""
    return storage.as_json({key: value for key, value in conditions.items() if key not in INFORMATION})


def is_finished(folder: epath.Path, conditions: dict[str, Any], last_file: str) -> bool:
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
    reference = extract_features(feature_net, experiment.eval_images)
    # As many training images as samples where there are as many, for a Fréchet distance depends on the counts.
    real = extract_features(feature_net, experiment.train_images[: config.eval.num_samples])
    sampled = {name: extract_features(feature_net, to_float(each.images)) for name, each in drawn.items()}
    results: dict[str, Any] = {}
    for name, vectors in sampled.items():
        results[name] = {
            "guidance": methods[name].text,
            "frechet_distance": frechet_distance_from_features(vectors, reference),
            "interval": bootstrap_interval(vectors, reference, **bootstrap),
            "evaluations_per_image": drawn[name].evaluations_per_image,
            "estimator_calls_per_image": drawn[name].estimator_calls_per_image,
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
    forward = measuring.forward(experiment, times, sample_labels(experiment))
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


def shifts_to_json(experiment: Experiment, shifts: dict[str, NoiseShift], measuring: Measuring) -> dict[str, Any]:
    """The content of noise_shift.json: the shift of every method, and whether NAG made it smaller."""
    evaluation = experiment.config.eval
    differences = shift_differences(
        shifts, measuring.calibration, seed=evaluation.seed, num_resamples=evaluation.num_resamples
    )
    return {"methods": {name: shift.to_json() for name, shift in shifts.items()}, "differences": differences}


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
