"""`--mode=evaluate --samples=A --reference=B`: the field's metrics of anybody's images; no network is sampled.

Features are computed block by block and kept until the metrics are written, so a killed evaluation goes on from its
last finished block. What is computed of the features is `metrics/`'s affair.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.config import Config
from nag_jax.data.image_sets import ImageSet, open_image_set
from nag_jax.errors import UserError
from nag_jax.feature_nets import load_feature_net
from nag_jax.figures import sample_grid
from nag_jax.hosts import is_first
from nag_jax.jobs import results
from nag_jax.jobs.experiment import commit, compiler_flags, environment
from nag_jax.jobs.image_features import extract
from nag_jax.jobs.scores import check_statistics, measure, open_reference, real_side
from nag_jax.metrics.curve_figure import curve_figure
from nag_jax.metrics.features import FeatureNet
from nag_jax.metrics.reference import Reference
from nag_jax.progress import stage


def run(
    config: Config,
    samples: epath.PathLike,
    reference: epath.PathLike,
    workdir: epath.Path,
    feature_net: FeatureNet | None = None,
) -> epath.Path:
    """Judges a set of images.

    Args:
        config: `eval.feature_net`, `eval.inception_score_order`, `eval.seed`, `eval.name` and `sampling.batch_size` are
            read.
        samples: an .npz of images or a folder of them.
        reference: the same, or an .npz of statistics.
        workdir: where results go.
        feature_net: takes the place of `eval.feature_net`, such as a function of yours
            (`metrics.features.from_function`).

    Returns:
        The folder evaluate/NAME with conditions.json, metrics.json, samples.png (the first images) and curve.png.

    Raises:
        UserError: a file cannot be read or holds something else, there is no feature net, or NAME holds an evaluation
            under other conditions.
    """
    feature_net = feature_net or open_feature_net(config)
    sample_set = open_image_set(samples)
    statistics, reference_set = open_reference(reference)
    check_statistics(statistics, feature_net, str(reference))
    with stage("hashing the images"):
        conditions = make_conditions(config, feature_net, sample_set, statistics, reference_set, str(reference))
    folder = epath.Path(workdir) / "evaluate" / folder_name(config, sample_set, conditions)
    if results.is_finished(folder, conditions, last_file="metrics.json"):
        return folder
    conditions = results.begin(folder, conditions)

    start = time.perf_counter()
    sampled = extract(feature_net, sample_set, folder / results.BLOCKS / "samples", config.sampling.batch_size)
    real = None
    if reference_set is not None:
        real = extract(feature_net, reference_set, folder / results.BLOCKS / "reference", config.sampling.batch_size)
    extracted = time.perf_counter()
    if is_first():
        with stage("metrics"):
            metrics, curve = measure(config, feature_net, sampled, real_side(real, statistics))
        metrics["seconds"] = {"features": extracted - start, "metrics": time.perf_counter() - extracted}
        metrics["environment"] = environment()
        metrics["conditions"] = conditions
        storage.write_bytes(folder / "samples.png", first_images(sample_set))
        if curve is not None:
            figure = curve_figure({sample_set.name: curve}, feature_net.distance_label)
            storage.write_bytes(folder / "curve.png", figure)
        # Written last: a folder with metrics.json is a finished evaluation, which needs its features no longer.
        storage.write_json(folder / "metrics.json", metrics)
    results.finish(folder)
    return folder


def describe(config: Config, samples: epath.PathLike, reference: epath.PathLike, workdir: epath.Path) -> str:
    """What `run` would do, in a few lines; nothing is computed or written. Raises UserError as `run` does."""
    feature_net, sample_set = open_feature_net(config), open_image_set(samples)
    statistics, reference_set = open_reference(reference)
    check_statistics(statistics, feature_net, str(reference))
    parts = ["statistics"] * (statistics is not None)
    parts += [f"{reference_set.count:,} images of {reference_set.image_shape}"] if reference_set else []
    return "\n".join(
        [
            "mode          evaluate",
            f"work folder   {workdir}",
            f"samples       {sample_set.path}: {sample_set.count:,} images of {sample_set.image_shape}",
            f"reference     {reference}: {', '.join(parts)}",
            f"feature net   {feature_net.name}; {feature_net.distance_label}",
        ]
    )


def open_feature_net(config: Config) -> FeatureNet:
    """The feature net in `eval.feature_net`. Raises UserError if there is none."""
    if not config.eval.feature_net:
        raise UserError(
            "Judging images needs a feature net: set --config.eval.feature_net=FOLDER. FID's is made by python -m "
            "nag_jax.convert of pt_inception-2015-12-05-6726825d.pth or classify_image_graph_def.pb."
        )
    return load_feature_net(config.eval.feature_net)


def make_conditions(
    config: Config,
    feature_net: FeatureNet,
    sample_set: ImageSet,
    statistics: Reference | None,
    reference_set: ImageSet | None,
    reference: str,
) -> dict[str, Any]:
    """All that the numbers depend on."""

    def of_images(images: ImageSet) -> dict[str, Any]:
        return {"count": images.count, "image_shape": images.image_shape, "sha256": images.fingerprint()}

    return {
        "samples": of_images(sample_set),
        "reference": {
            "statistics": statistics.fingerprint if statistics else None,
            "images": of_images(reference_set) if reference_set else None,
        },
        "feature_net": {"name": feature_net.name, "fingerprint": feature_net.fingerprint},
        "inception_score_order": config.eval.inception_score_order,
        "seed": config.eval.seed,
        "device": jax.devices()[0].device_kind,
        "compiler_flags": compiler_flags(),
        "checkpoint": f"{sample_set.path} against {reference}",
        "commit": commit(),
    }


def folder_name(config: Config, sample_set: ImageSet, conditions: dict[str, Any]) -> str:
    """`eval.name`, or the samples' name with a digest of the conditions."""
    if config.eval.name:
        return config.eval.name
    return f"{sample_set.name}-{results.digest(conditions)}"


def first_images(images: ImageSet) -> bytes:
    """A picture of the first images, up to 80; beside a row stands the number of its first."""
    per_row, rows = 8, 10
    first = next(images.batches(per_row * rows))
    starts = np.arange(len(first)) // per_row * per_row
    return sample_grid({images.name: (first, starts)}, per_class=per_row)
