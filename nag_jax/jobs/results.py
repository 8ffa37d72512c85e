"""Results of jobs: their folders and conditions, what is measured on drawn samples, and the files it goes into.

A result's folder is finished when its last file is there. The same conditions read it back; other conditions under the
same name are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.config import Config, to_dict
from nag_jax.data.image_sets import ImageSet, write_image_set
from nag_jax.diffusion.time_posterior import Estimator
from nag_jax.errors import UserError
from nag_jax.figures import sample_grid, shown_samples
from nag_jax.hosts import check_same, check_shared, from_first, is_first, wait_for_all
from nag_jax.jobs import features
from nag_jax.jobs.drawing import SHOWN_PER_CLASS, Drawn, images, sample_labels, sampled_network
from nag_jax.jobs.estimators import Measuring
from nag_jax.jobs.experiment import Experiment, TrainedNetwork, commit, compiler_flags, config_digest
from nag_jax.jobs.image_features import extract
from nag_jax.jobs.methods import Method
from nag_jax.jobs.scores import (
    POOL,
    Features,
    check_statistics,
    distance,
    features_of,
    measure,
    open_reference,
    real_side,
)
from nag_jax.metrics.extrapolation import DistanceCurve
from nag_jax.metrics.features import FeatureNet
from nag_jax.metrics.frechet import bootstrap_interval, frechet_distance_from_features, paired_bootstrap_difference
from nag_jax.metrics.reference import Reference
from nag_jax.noise_shift.difference import shift_differences
from nag_jax.noise_shift.measurement import NoiseShift, compare_answers
from nag_jax.parallel import to_host
from nag_jax.params_hash import params_hash

BLOCKS = "blocks"  # what is drawn already, in a result's folder until its last file is written
MAX_BOOTSTRAP_DIMENSION = 512

# What stands among the conditions for information alone: but for rounding it changes no number that the others leave
# equal.
INFORMATION = ("checkpoint", "config", "commit", "earlier_commits", "batch_size", "compiler_flags")


def sampling_conditions(
    experiment: Experiment, network: TrainedNetwork, methods: Mapping[str, Method], guiding: Estimator | None
) -> dict[str, Any]:
    """All that samples depend on, and where they come from, to stand beside every number.

    The attention is the one that is computed by: what "auto" chose is kept with the work folder, so that the same
    command finds the same result.
    """
    config, vae = experiment.config, experiment.decoder.vae
    model = sampled_network(experiment).model
    conditions = {
        "step": network.step,
        "network": network.fingerprint,
        "guiding_estimator": None if guiding is None else params_hash(to_host(guiding.params)),
        "methods": {name: method.text for name, method in methods.items()},
        "sampling": {key: value for key, value in to_dict(config.sampling).items() if key != "batch_size"},
        "batch_size": config.sampling.batch_size,
        "num_samples": config.eval.num_samples,
        "seed": config.eval.seed,
        "dtype": model.dtype,
        "precision": model.precision,
        "attention": model.attention,
        "device": jax.devices()[0].device_kind,
        "compiler_flags": compiler_flags(),
        "vae": {"name": vae.name, "fingerprint": vae.fingerprint} if vae else None,
        "checkpoint": str(experiment.network_folder),
        "config": config_digest(config),
        "commit": commit(),
    }
    if any(method.needs_original for method in methods.values()):
        conditions["original_network"] = params_hash(to_host(experiment.original_params))
    if config.sampling.label_rule == "reference":
        conditions["reference"] = experiment.eval_source.fingerprint
        conditions["num_reference_labels"] = len(experiment.eval_states[1])
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


def measuring_conditions(experiment: Experiment, judge: Judge, measuring: Measuring | None) -> dict[str, Any]:
    """All that distances and noise shifts depend on besides the samples."""
    feature_net = judge.feature_net
    conditions: dict[str, Any] = {
        "features": {"name": feature_net.name, "fingerprint": feature_net.fingerprint},
        "num_resamples": experiment.config.eval.num_resamples,
        "inception_score_order": experiment.config.eval.inception_score_order,
    }
    if experiment.config.eval.reference:
        conditions["judged_against"] = {
            "statistics": judge.statistics.fingerprint if judge.statistics else None,
            "images": judge.images.fingerprint() if judge.images else None,
        }
    if measuring is not None or not experiment.config.eval.reference:
        conditions |= shift_conditions(experiment, measuring)
    return conditions


def folder_name(config: Config, conditions: dict[str, Any]) -> str:
    """`eval.name`, or a readable digest of the conditions."""
    if config.eval.name:
        return config.eval.name
    return f"{config.sampling.stepper}-{config.sampling.num_steps}-n{config.eval.num_samples}-{digest(conditions)}"


def digest(conditions: dict[str, Any]) -> str:
    """Eight hexadecimal digits that differ between conditions."""
    return storage.digest(comparable(conditions))


def comparable(conditions: dict[str, Any]) -> dict[str, Any]:
    """The conditions that decide the numbers, as JSON holds them."""
    return storage.as_json({key: value for key, value in conditions.items() if key not in INFORMATION})


def is_finished(folder: epath.Path, conditions: dict[str, Any], last_file: str) -> bool:
    """Whether `folder` holds this result: its last file is there.

    Raises:
        UserError: it has other conditions, or the conditions of several processes differ.
    """
    check_same("network, set of data or device", digest(conditions))
    is_there = from_first(lambda: _is_finished(folder, conditions, last_file))
    if is_there:
        finish(folder)  # where a run was killed before it could
    return is_there


def _is_finished(folder: epath.Path, conditions: dict[str, Any], last_file: str) -> bool:
    if not (folder / "conditions.json").exists():
        return False
    stored, wanted = comparable(storage.read_json(folder / "conditions.json")), comparable(conditions)
    differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    if differing:
        raise UserError(
            f"{folder} holds results under other conditions: {', '.join(differing)} differ. "
            "Choose another config.eval.name, or leave it empty."
        )
    return (folder / last_file).exists()


def begin(folder: epath.Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """Says what `folder` will hold, before anything is drawn: blocks that a killed run leaves there are of these.

    Returns:
        The conditions, and the commits of killed runs whose blocks this one goes on from, if they were others.
    """
    file = folder / "conditions.json"
    others = from_first(lambda: _earlier_commits(file, conditions["commit"]))
    if others:
        conditions = conditions | {"earlier_commits": others}
    if is_first():
        storage.write_json(file, conditions)
    check_shared(file)
    return conditions


def _earlier_commits(file: epath.Path, commit: str | None) -> list[str | None]:
    if not file.exists():
        return []
    stored = storage.read_json(file)
    commits = [*stored.get("earlier_commits", []), stored.get("commit")]
    return [earlier for earlier in dict.fromkeys(commits) if earlier != commit]


def finish(folder: epath.Path) -> None:
    """Removes the blocks of a result whose last file is written."""
    if is_first() and (folder / BLOCKS).exists():
        (folder / BLOCKS).rmtree()
    wait_for_all("result")


class Judge(NamedTuple):
    """What distances are measured with: a feature net and a reference, opened and checked before anything is drawn.

    Attributes:
        feature_net: the network.
        accuracy: its accuracy on held-out images where that is known.
        statistics: stored moments of the reference, or None.
        images: the reference's images; None where it has none, or is the held-out images.
    """

    feature_net: FeatureNet
    accuracy: float | None
    statistics: Reference | None
    images: ImageSet | None


def prepare_judge(experiment: Experiment) -> Judge:
    """Opens `eval.feature_net` (or trains a classifier) and `eval.reference`.

    Raises:
        UserError: one of them cannot be read, or they do not belong together.
    """
    path = experiment.config.eval.reference
    statistics, images = open_reference(path) if path else (None, None)
    feature_net, accuracy = features.prepare(experiment)
    check_statistics(statistics, feature_net, path)
    return Judge(feature_net, accuracy, statistics, images)


def check_judge(config: Config) -> None:
    """Refuses, before anything long runs, what `prepare_judge` would refuse."""
    feature_net = features.read_pretrained(config)
    if config.eval.reference:
        statistics, _ = open_reference(config.eval.reference)
        if feature_net is not None:
            check_statistics(statistics, feature_net, config.eval.reference)


def measure_distances(
    experiment: Experiment,
    methods: dict[str, Method],
    drawn: dict[str, Drawn],
    judge: Judge,
    folder: epath.Path,
    *,
    with_other_metrics: bool = True,
) -> tuple[dict[str, Any], dict[str, DistanceCurve]]:
    """Judges the samples of every method on their features.

    Args:
        experiment: config and data.
        methods: by name.
        drawn: their samples.
        judge: feature net and reference.
        folder: where features of a reference's images are kept until the result is written.
        with_other_metrics: besides the Fréchet distance, the other metrics of `scores` and the curve.

    Returns:
        (content of metrics.json: for every method its distance with a bootstrap interval, and the metrics of `scores`,
        beside the real-against-real floor; the distance over the number of samples, by method).
    """
    config, feature_net = experiment.config, judge.feature_net
    bootstrap = {"num_resamples": config.eval.num_resamples, "seed": config.eval.seed}
    real = reference_features(experiment, judge, folder)
    side = real_side(real, judge.statistics)
    # A resample costs a distance, and the interval is meant for few dimensions; see `bootstrap_interval`.
    resampled = real[POOL] if real is not None and feature_net.dimension <= MAX_BOOTSTRAP_DIMENSION else None
    methods_json: dict[str, Any] = {}
    curves: dict[str, DistanceCurve] = {}
    for name, each in drawn.items():
        vectors = each.features[POOL]
        measured: dict[str, Any] = {}
        if with_other_metrics:
            measured, curve = measure(config, feature_net, each.features, side)
            if curve is not None:
                curves[name] = curve
        elif side.pool is not None:
            measured = {"frechet_distance": {"value": distance(side.pool, vectors)}}
        measured_distance = measured.pop("frechet_distance", {})
        methods_json[name] = {
            "guidance": methods[name].text,
            "frechet_distance": measured_distance.get("value"),
            "interval": None if resampled is None else bootstrap_interval(vectors, resampled, **bootstrap),
            "evaluations_per_image": each.evaluations_per_image,
            "estimator_calls_per_image": each.estimator_calls_per_image,
            "seconds": each.seconds,
            "curve": measured_distance.get("curve"),
        } | {key: value for key, value in measured.items() if not key.startswith("num_")}
    if resampled is not None and "plain" in drawn:
        plain = drawn["plain"].features[POOL]
        for name in drawn.keys() - {"plain"}:
            gap = methods_json[name]["frechet_distance"] - methods_json["plain"]["frechet_distance"]
            interval = paired_bootstrap_difference(drawn[name].features[POOL], plain, resampled, **bootstrap)
            methods_json[name]["difference_to_plain"] = {"value": gap, "interval": interval}
    floor = None
    if real is not None and not config.eval.reference:
        floor = real_against_real(experiment, feature_net, real[POOL], bootstrap)
    return {
        "methods": methods_json,
        "floor": floor,
        "features": {
            "name": feature_net.name,
            "label": feature_net.distance_label,
            "held_out_accuracy": judge.accuracy,
            "dimension": feature_net.dimension,
        },
        "reference": config.eval.reference or "held-out images",
        "num_samples": config.eval.num_samples,
        "num_reference": side.num_reference,
        "num_reference_images": None if real is None else len(real[POOL]),
    }, curves


def reference_features(experiment: Experiment, judge: Judge, folder: epath.Path) -> Features | None:
    """Features of the reference's images: those of `eval.reference`, or held-out ones; None where it has none."""
    batch_size = experiment.config.sampling.batch_size
    if not experiment.config.eval.reference:
        return features_of(judge.feature_net, experiment.eval_images, batch_size)
    if judge.images is None:
        return None
    return extract(judge.feature_net, judge.images, folder / BLOCKS / "reference", batch_size)


def real_against_real(
    experiment: Experiment, feature_net: FeatureNet, reference: np.ndarray, bootstrap: dict[str, int]
) -> dict[str, Any]:
    """The distance of training images from the held-out ones, below which no method can be told from real images.

    As many training images as samples where there are as many, for a Fréchet distance depends on the counts.
    """
    config = experiment.config
    images = experiment.train_images[: config.eval.num_samples]
    real = features_of(feature_net, images, config.sampling.batch_size)[POOL]
    has_interval = feature_net.dimension <= MAX_BOOTSTRAP_DIMENSION
    fitted = "" if config.eval.feature_net else "; the features were fitted on the training images"
    return {
        "frechet_distance": frechet_distance_from_features(real, reference),
        "interval": bootstrap_interval(real, reference, **bootstrap) if has_interval else None,
        "description": f"training images against held-out images{fitted}",
        "num_a": len(real),
        "num_b": len(reference),
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


def write_pictures(experiment: Experiment, drawn: dict[str, Drawn], folder: epath.Path) -> None:
    """samples.png: every method's samples by class."""
    labels = sample_labels(experiment)
    shown = labels[shown_samples(labels, SHOWN_PER_CLASS)]
    grid = sample_grid({name: (each.shown, shown) for name, each in drawn.items()}, per_class=SHOWN_PER_CLASS)
    storage.write_bytes(folder / "samples.png", grid)


def write_samples(experiment: Experiment, drawn: dict[str, Drawn], folder: epath.Path) -> None:
    """Every method's images and labels in ADM's layout, `sample_files`."""
    labels = sample_labels(experiment)
    for file, each in zip(sample_files(drawn), drawn.values(), strict=True):
        write_image_set(folder / file, images(each), labels)


def sample_files(methods: Iterable[str]) -> list[str]:
    """The names of the files of samples: samples.npz for one method, samples-METHOD.npz for several."""
    names = list(methods)
    return ["samples.npz"] if len(names) == 1 else [f"samples-{name}.npz" for name in names]
