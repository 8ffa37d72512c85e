"""The field's metrics of features, all that the feature net and the reference allow; what each is stands in `metrics/`.

Jobs that sample a network and the one that judges anybody's images share this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from numpy.typing import NDArray

from nag_jax.config import Config
from nag_jax.data.image_sets import ImageSet, open_image_set
from nag_jax.data.images import to_float
from nag_jax.errors import UserError
from nag_jax.metrics.accumulate import moments_in_blocks
from nag_jax.metrics.extrapolation import DistanceCurve, distance_curve
from nag_jax.metrics.features import FeatureNet, features, tapped_features
from nag_jax.metrics.frechet import DistanceTo, Moments
from nag_jax.metrics.inception_score import inception_score
from nag_jax.metrics.kernel_distance import kernel_distance
from nag_jax.metrics.manifold import density_coverage, manifold, precision_recall
from nag_jax.metrics.reference import Reference, read_reference

POOL, SPATIAL, LOGITS = "pool3", "spatial", "logits_unbiased"
KERNEL_SUBSET = 1000
NEIGHBOURS_PRECISION, NEIGHBOURS_DENSITY = 3, 5
SMALLEST_CURVE = 20  # samples

Features = dict[str, NDArray[np.float32]]


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


def outputs_in_use(feature_net: FeatureNet) -> list[str]:
    """What `measure` can use of a network: FID's has three taps, others have their features alone."""
    if POOL not in feature_net.taps:
        return [POOL]
    return [tap for tap in (POOL, SPATIAL, LOGITS) if tap in feature_net.taps]


def feature_function(feature_net: FeatureNet) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """The `outputs_in_use` as a pure function (params, images float [B, H, W, C]) -> {tap: [B, width]}."""
    taps, apply_taps = outputs_in_use(feature_net), feature_net.apply_taps
    if POOL not in feature_net.taps or apply_taps is None:
        return lambda params, images: {POOL: feature_net.apply(params, images)}

    def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        outputs = apply_taps(params, images)
        return {tap: outputs[tap] for tap in taps}

    return function


def features_of(feature_net: FeatureNet, images: NDArray[np.uint8], batch_size: int) -> Features:
    """The `outputs_in_use` of images uint8 [N, H, W, C] on the host."""
    if POOL in feature_net.taps:
        return tapped_features(feature_net, to_float(images), outputs_in_use(feature_net), batch_size)
    return {POOL: features(feature_net, to_float(images), batch_size)}


def measure(
    config: Config, feature_net: FeatureNet, sampled: Features, real: Features | None, statistics: Reference | None
) -> tuple[dict[str, Any], DistanceCurve | None]:
    """Every metric that the taps and the reference allow.

    Args:
        config: seed and order of the Inception Score.
        feature_net: what the features are of.
        sampled: features of the samples.
        real: features of the reference's images, or None.
        statistics: stored moments; where a reference has some, they count, as in ADM's evaluator.

    Returns:
        (the metrics by name, the distance over the number of samples or None).
    """
    metrics: dict[str, Any] = {"num_samples": len(sampled[POOL]), "num_reference": len(real[POOL]) if real else None}
    label = feature_net.distance_label
    curve = None
    pool = reference_moments(POOL, statistics.pool if statistics else None, real)
    if pool is not None:
        distance_to = DistanceTo(pool)
        metrics["frechet_distance"] = {"label": label, "value": distance(distance_to, sampled[POOL])}
        if len(sampled[POOL]) >= SMALLEST_CURVE:
            curve = distance_curve(sampled[POOL], distance_to, seed=config.eval.seed)
            metrics["frechet_distance"]["curve"] = dataclasses.asdict(curve)
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
    return metrics, curve


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
