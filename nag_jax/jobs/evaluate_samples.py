"""`--mode=evaluate --samples=A --reference=B`: the field's metrics of anybody's images; no network is sampled.

Features are computed block by block and kept until the metrics are written, so a killed evaluation goes on from its
last finished block. What is computed of the features is `metrics/`'s affair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from numpy.typing import NDArray

from nag_jax import storage
from nag_jax.config import Config
from nag_jax.data.image_sets import ImageSet, open_image_set
from nag_jax.data.images import to_float
from nag_jax.errors import UserError
from nag_jax.feature_nets import load_feature_net
from nag_jax.jobs import results
from nag_jax.jobs.experiment import commit, environment
from nag_jax.metrics.accumulate import MAX_BLOCK_ROWS, moments_in_blocks
from nag_jax.metrics.curve_figure import curve_figure
from nag_jax.metrics.extrapolation import distance_curve
from nag_jax.metrics.features import FeatureNet, features, tapped_features
from nag_jax.metrics.frechet import DistanceTo, Moments
from nag_jax.metrics.inception_score import inception_score
from nag_jax.metrics.kernel_distance import kernel_distance
from nag_jax.metrics.manifold import density_coverage, manifold, precision_recall
from nag_jax.metrics.reference import Reference, read_reference
from nag_jax.parallel import wait_for_all_hosts
from nag_jax.progress import progress, stage

POOL, SPATIAL, LOGITS = "pool3", "spatial", "logits_unbiased"
KERNEL_SUBSET = 1000
NEIGHBOURS_PRECISION, NEIGHBOURS_DENSITY = 3, 5
SMALLEST_CURVE = 20  # samples

Features = dict[str, NDArray[np.float32]]


def run(config: Config, samples: epath.PathLike, reference: epath.PathLike, workdir: epath.Path) -> epath.Path:
    """Judges a set of images; returns the folder evaluate/NAME with conditions.json, metrics.json and curve.png.

    Args:
        config: `eval.feature_net`, `eval.inception_score_order`, `eval.seed`, `eval.name` and `sampling.batch_size` are
            read.
        samples: an .npz of images or a folder of them.
        reference: the same, or an .npz of statistics.
        workdir: where results go.

    Raises:
        UserError: a file cannot be read or holds something else, there is no feature net, or NAME holds an evaluation
            under other conditions.
    """
    feature_net = open_feature_net(config)
    sample_set = open_image_set(samples)
    statistics, reference_set = open_reference(reference)
    check_statistics(statistics, feature_net, str(reference))
    with stage("hashing the images"):
        conditions = make_conditions(config, feature_net, sample_set, statistics, reference_set, str(reference))
    folder = epath.Path(workdir) / "evaluate" / folder_name(config, sample_set, conditions)
    if results.is_finished(folder, conditions, last_file="metrics.json"):
        return folder
    is_main = jax.process_index() == 0
    if is_main:
        storage.write_json(folder / "conditions.json", conditions)

    start = time.perf_counter()
    sampled = extract(feature_net, sample_set, folder / "blocks" / "samples", config.sampling.batch_size)
    real = None
    if reference_set is not None:
        real = extract(feature_net, reference_set, folder / "blocks" / "reference", config.sampling.batch_size)
    extracted = time.perf_counter()
    if is_main:
        with stage("metrics"):
            metrics, curve = measure(config, feature_net, sampled, real, statistics)
        metrics["seconds"] = {"features": extracted - start, "metrics": time.perf_counter() - extracted}
        metrics["environment"] = environment()
        if curve is not None:
            storage.write_bytes(folder / "curve.png", curve)
        # Written last: a folder with metrics.json is a finished evaluation, which needs its features no longer.
        storage.write_json(folder / "metrics.json", metrics)
        shutil.rmtree(folder / "blocks", ignore_errors=True)
    wait_for_all_hosts("evaluated")
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


def open_reference(path: epath.PathLike) -> tuple[Reference | None, ImageSet | None]:
    """The statistics and the images of a reference, what there is of them. Raises UserError if it has neither."""
    if epath.Path(path).is_dir():
        return None, open_image_set(path)
    statistics = read_reference(path)
    images = open_image_set(path) if statistics.image_shape is not None else None
    return statistics if statistics.pool is not None or statistics.spatial is not None else None, images


def check_statistics(statistics: Reference | None, feature_net: FeatureNet, path: str) -> None:
    """Raises UserError if stored statistics are of another dimension than the features."""
    if statistics is not None and statistics.pool is not None and statistics.pool.mean.size != feature_net.dimension:
        raise UserError(
            f"{path} has statistics of {statistics.pool.mean.size} dimensions, {feature_net.name} has "
            f"{feature_net.dimension}: they are of another one. Give images, or another config.eval.feature_net."
        )


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
        "checkpoint": f"{sample_set.path} against {reference}",
        "commit": commit(),
    }


def folder_name(config: Config, sample_set: ImageSet, conditions: dict[str, Any]) -> str:
    """`eval.name`, or the samples' name with a digest of the conditions."""
    if config.eval.name:
        return config.eval.name
    digest = hashlib.sha256(json.dumps(results.comparable(conditions), sort_keys=True).encode()).hexdigest()[:8]
    return f"{epath.Path(sample_set.path).stem}-{digest}"


def extract(feature_net: FeatureNet, images: ImageSet, folder: epath.Path, batch_size: int) -> Features:
    """Features of a set, from the blocks that are there and from the images for the others.

    Process p of P computes the blocks p, p + P, ...; a block's file is there when it is whole.

    Args:
        feature_net: the network.
        images: the set.
        folder: of the blocks.
        batch_size: images per call of the network.

    Returns:
        Arrays [N, width] by tap.

    Raises:
        UserError: an image cannot be read.
    """
    firsts = range(0, images.count, MAX_BLOCK_ROWS)
    files = [folder / f"{number:05d}.npz" for number in range(len(firsts))]
    own = range(jax.process_index(), len(files), jax.process_count())
    missing = [number for number in own if not files[number].exists()]
    done = sum(min(MAX_BLOCK_ROWS, images.count - firsts[number]) for number in own if number not in missing)
    total = sum(min(MAX_BLOCK_ROWS, images.count - firsts[number]) for number in own)
    if done:
        print(f"{done} of {total} images have their features already.", file=sys.stderr, flush=True)
    if missing:
        with progress(f"features of {epath.Path(images.path).name}", total, done) as report_progress:
            batches = images.batches(MAX_BLOCK_ROWS, firsts[missing[0]])
            for number, block in enumerate(batches, start=missing[0]):
                if number not in missing:
                    continue
                vectors = features_of(feature_net, block, batch_size)
                buffer = io.BytesIO()
                np.savez(buffer, **vectors)  # type: ignore[arg-type]
                storage.write_bytes(files[number], buffer.getvalue())
                done += len(block)
                report_progress(done, "")
    wait_for_all_hosts(f"features of {images.path}")
    return join_blocks(files)


def features_of(feature_net: FeatureNet, images: NDArray[np.uint8], batch_size: int) -> Features:
    """What the metrics need of some images: FID's network has three taps, others have their features alone."""
    taps = [tap for tap in (POOL, SPATIAL, LOGITS) if tap in feature_net.taps]
    if POOL in taps:
        return tapped_features(feature_net, to_float(images), taps, batch_size)
    return {POOL: features(feature_net, to_float(images), batch_size)}


def join_blocks(files: list[epath.Path]) -> Features:
    """The blocks' arrays one behind the other. Raises UserError if a file is damaged."""
    blocks = []
    for file in files:
        try:
            with np.load(io.BytesIO(file.read_bytes())) as arrays:
                blocks.append({tap: arrays[tap] for tap in arrays.files})
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is missing or damaged ({error}). Delete it and run the command again.") from error
    return {tap: np.concatenate([block[tap] for block in blocks]) for tap in blocks[0]}


def measure(
    config: Config, feature_net: FeatureNet, sampled: Features, real: Features | None, statistics: Reference | None
) -> tuple[dict[str, Any], bytes | None]:
    """Every metric that the taps and the reference allow.

    Args:
        config: seed and order of the Inception Score.
        feature_net: what the features are of.
        sampled: features of the samples.
        real: features of the reference's images, or None.
        statistics: stored moments; where a reference has some, they count, as in ADM's evaluator.

    Returns:
        (content of metrics.json, curve.png or None).
    """
    metrics: dict[str, Any] = {"num_samples": len(sampled[POOL]), "num_reference": len(real[POOL]) if real else None}
    label = feature_net.distance_label
    curve_png = None
    pool = reference_moments(POOL, statistics.pool if statistics else None, real)
    if pool is not None:
        distance_to = DistanceTo(pool)
        metrics["frechet_distance"] = {"label": label, "value": distance(distance_to, sampled[POOL])}
        if len(sampled[POOL]) >= SMALLEST_CURVE:
            curve = distance_curve(sampled[POOL], distance_to, seed=config.eval.seed)
            metrics["frechet_distance"]["curve"] = dataclasses.asdict(curve)
            curve_png = curve_figure(curve, label)
    spatial = reference_moments(SPATIAL, statistics.spatial if statistics else None, real)
    if spatial is not None and SPATIAL in sampled:
        value = distance(DistanceTo(spatial), sampled[SPATIAL])
        metrics["spatial_frechet_distance"] = {"label": "sFID", "value": value}
    if LOGITS in sampled:
        order = config.eval.inception_score_order
        score = inception_score(sampled[LOGITS], order=order, seed=config.eval.seed)
        metrics["inception_score"] = {"mean": score.mean, "std": score.std, "splits": len(score.scores), "order": order}
    if real is not None:
        metrics |= compare_sets(sampled[POOL], real[POOL], config.eval.seed)
    return metrics, curve_png


def reference_moments(tap: str, stored: Moments | None, real: Features | None) -> Moments | None:
    """The reference's moments of a tap: stored ones, else those of its images, else None."""
    if stored is not None or real is None or tap not in real:
        return stored
    return moments_in_blocks(real[tap]).moments()


def distance(distance_to: DistanceTo, vectors: NDArray[np.float32]) -> float:
    """The Fréchet distance of features, in the form that is accurate for their number."""
    if len(vectors) < vectors.shape[1]:
        return distance_to.of_features(vectors)
    return distance_to.of_moments(moments_in_blocks(vectors).moments())


def compare_sets(sampled: NDArray[np.float32], real: NDArray[np.float32], seed: int) -> dict[str, Any]:
    """The metrics that compare features with features, those for which there are images enough."""
    smaller = min(len(sampled), len(real))
    metrics: dict[str, Any] = {}
    if smaller > NEIGHBOURS_DENSITY:
        balls = manifold(real, largest_k=NEIGHBOURS_DENSITY)
        found = precision_recall(manifold(sampled, largest_k=NEIGHBOURS_PRECISION), balls, k=NEIGHBOURS_PRECISION)
        covered = density_coverage(sampled, balls, k=NEIGHBOURS_DENSITY)
        metrics |= dataclasses.asdict(found) | dataclasses.asdict(covered)
        metrics["neighbours"] = {"precision, recall": NEIGHBOURS_PRECISION, "density, coverage": NEIGHBOURS_DENSITY}
    if smaller >= 2:
        subset_size = min(KERNEL_SUBSET, smaller)
        kernel = kernel_distance(sampled, real, subset_size=subset_size, seed=seed)
        metrics["kernel_distance"] = {
            "mean": kernel.mean,
            "std": kernel.std,
            "subset_size": subset_size,
            "subsets": len(kernel.distances),
        }
    return metrics
