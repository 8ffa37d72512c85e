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
from nag_jax.errors import UserError
from nag_jax.metrics.accumulate import moments_in_blocks
from nag_jax.metrics.extrapolation import DistanceCurve, default_sizes, distance_curve
from nag_jax.metrics.features import FeatureNet, features, tapped_features
from nag_jax.metrics.frechet import DistanceTo, Moments
from nag_jax.metrics.inception_score import inception_score
from nag_jax.metrics.kernel_distance import kernel_distance
from nag_jax.metrics.manifold import Manifold, density_coverage, manifold, precision_recall
from nag_jax.metrics.reference import Reference, read_reference
from nag_jax.parallel import local_mesh

POOL, SPATIAL, LOGITS = "pool3", "spatial", "logits_unbiased"
KERNEL_SUBSET = 1000
NEIGHBOURS_PRECISION, NEIGHBOURS_DENSITY = 3, 5
SMALLEST_CURVE = 20  # samples
NUM_SPLITS = 10  # of the Inception Score

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
    if statistics is None:
        return
    widths = {"mu": feature_net.dimension, "mu_s": feature_net.taps.get(SPATIAL)}
    for (name, width), stored in zip(widths.items(), (statistics.pool, statistics.spatial), strict=True):
        if stored is not None and width is not None and stored.mean.size != width:
            raise UserError(
                f"{name} in {path} has {stored.mean.size} dimensions, {feature_net.name} has {width}: it is of another "
                "network. Give images alone, or another config.eval.feature_net."
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


def features_of(feature_net: FeatureNet, images: np.ndarray, batch_size: int) -> Features:
    """The `outputs_in_use` of images on the host: [N, H, W, C], bytes or float in [-1, 1]."""
    if POOL in feature_net.taps:
        return tapped_features(feature_net, images, outputs_in_use(feature_net), batch_size)
    return {POOL: features(feature_net, images, batch_size)}


@dataclasses.dataclass(frozen=True, eq=False)
class RealSide:
    """What samples are compared with, computed once for all sets of samples.

    Attributes:
        pool: for distances of pooled features, or None.
        spatial: for distances of spatial features, or None.
        num_reference: how many images the moments are of; None where a file of statistics does not say it.
        vectors: pooled features of the reference's images, or None.
        balls: their manifold; None without images, or with too few.
    """

    pool: DistanceTo | None
    spatial: DistanceTo | None
    num_reference: int | None
    vectors: NDArray[np.float32] | None
    balls: Manifold | None


def real_side(real: Features | None, statistics: Reference | None) -> RealSide:
    """Prepares a reference.

    Args:
        real: features of its images, or None.
        statistics: stored moments; where a reference has some, they count, as in ADM's evaluator.
    """
    vectors = real[POOL] if real else None
    pool = reference_moments(POOL, statistics.pool if statistics else None, real)
    spatial = reference_moments(SPATIAL, statistics.spatial if statistics else None, real)
    balls = None
    if vectors is not None and len(vectors) > NEIGHBOURS_DENSITY:
        balls = manifold(vectors, largest_k=NEIGHBOURS_DENSITY, mesh=local_mesh())
    return RealSide(
        pool=DistanceTo(pool) if pool else None,
        spatial=DistanceTo(spatial) if spatial else None,
        num_reference=pool.count if pool else None,
        vectors=vectors,
        balls=balls,
    )


def measure(
    config: Config, feature_net: FeatureNet, sampled: Features, real: RealSide
) -> tuple[dict[str, Any], DistanceCurve | None]:
    """Every metric that the taps, the reference and the numbers of images allow.

    Args:
        config: seed and order of the Inception Score.
        feature_net: what the features are of.
        sampled: features of the samples.
        real: what they are compared with.

    Returns:
        (the metrics by name, the distance over the number of samples or None).
    """
    vectors = sampled[POOL]
    metrics: dict[str, Any] = {
        "num_samples": len(vectors),
        "num_reference": real.num_reference,
        "num_reference_images": None if real.vectors is None else len(real.vectors),
    }
    curve = None
    if real.pool is not None:
        label = feature_net.distance_label
        metrics["frechet_distance"] = {"label": label, "value": distance(real.pool, vectors)}
        sizes = curve_sizes(*vectors.shape)
        if sizes:
            curve = distance_curve(vectors, real.pool, sizes=sizes, seed=config.eval.seed)
            metrics["frechet_distance"]["curve"] = dataclasses.asdict(curve)
    if real.spatial is not None and SPATIAL in sampled:
        value = distance(real.spatial, sampled[SPATIAL])
        metrics["spatial_frechet_distance"] = {"label": "sFID", "value": value}
    if LOGITS in sampled and len(vectors) >= NUM_SPLITS:
        order = config.eval.inception_score_order
        score = inception_score(sampled[LOGITS], num_splits=NUM_SPLITS, order=order, seed=config.eval.seed)
        metrics["inception_score"] = {"mean": score.mean, "std": score.std, "splits": NUM_SPLITS, "order": order}
    if real.vectors is not None:
        metrics |= compare_sets(vectors, real.vectors, real.balls, config.eval.seed)
    return metrics, curve


def curve_sizes(num_samples: int, dimension: int) -> list[int]:
    """The numbers of samples at which the distance is taken for its curve; none where it would mislead.

    A covariance of fewer vectors than about twice their dimension is far from the straight line in 1 / n, and a line
    needs a few sizes beyond that: without five times as many samples as dimensions there is no curve.
    """
    if num_samples < max(SMALLEST_CURVE, 5 * dimension):
        return []
    return [size for size in default_sizes(num_samples) if size >= 2 * dimension]


def reference_moments(tap: str, stored: Moments | None, real: Features | None) -> Moments | None:
    """The reference's moments of a tap: stored ones, else those of its images, else None."""
    if stored is not None or real is None or tap not in real:
        return stored
    return moments_in_blocks(real[tap], mesh=local_mesh()).moments()


def distance(distance_to: DistanceTo, vectors: NDArray[np.float32]) -> float:
    """The Fréchet distance of features, in the form that is accurate for their number."""
    if len(vectors) < vectors.shape[1]:
        return distance_to.of_features(vectors)
    return distance_to.of_moments(moments_in_blocks(vectors, mesh=local_mesh()).moments())


def compare_sets(
    sampled: NDArray[np.float32], real: NDArray[np.float32], balls: Manifold | None, seed: int
) -> dict[str, Any]:
    """The metrics that compare features with features, those for which there are images enough."""
    smaller, mesh = min(len(sampled), len(real)), local_mesh()
    metrics: dict[str, Any] = {}
    if balls is not None and smaller > NEIGHBOURS_DENSITY:
        own_balls = manifold(sampled, largest_k=NEIGHBOURS_PRECISION, mesh=mesh)
        found = precision_recall(own_balls, balls, k=NEIGHBOURS_PRECISION, mesh=mesh)
        covered = density_coverage(sampled, balls, k=NEIGHBOURS_DENSITY, mesh=mesh)
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
