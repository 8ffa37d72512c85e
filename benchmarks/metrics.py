"""How long do the metrics on features take, and how wrong is a Fréchet distance, at Inception's 2,048 dimensions?

    python benchmarks/metrics.py

Both covariances share their eigenvectors, so the distance has a closed form, sum (sqrt a - sqrt b)^2, beside which
stand in one run ours, scipy's `sqrtm` of the product, torch-fidelity's eigenvalues of it (if it is installed) and ours
with float32 eigendecompositions. Then rows a second of the streaming moments, and of the manifolds of 2,000 vectors.

Writes results/metrics_cpu.json; a minute and a half on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import scipy.linalg

from nag_jax import storage
from nag_jax.jobs.experiment import environment
from nag_jax.metrics.accumulate import MAX_BLOCK_ROWS, add_block, start
from nag_jax.metrics.frechet import DistanceTo, Moments, frechet_distance
from nag_jax.metrics.manifold import manifold, precision_recall

# torch-fidelity imports these for its feature nets; nothing that is used here does.
TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def commuting_pair(dimension: int, rng: np.random.Generator) -> tuple[Moments, Moments, float]:
    """Two covariances of spectra that fall from 1 to 10^-5, and their distance."""
    rotation = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
    spectra = [np.geomspace(1.0, 1e-5, dimension) * rng.uniform(0.8, 1.25, dimension) for _ in range(2)]
    a, b = (Moments(None, np.zeros(dimension), (rotation * values) @ rotation.T) for values in spectra)
    return a, b, float(np.square(np.sqrt(spectra[0]) - np.sqrt(spectra[1])).sum())


def with_sqrtm(a: Moments, b: Moments) -> float:
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    return float(np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * np.trace(root.real))


def with_float32(a: Moments, b: Moments) -> float:
    """What `frechet_distance` would give if its eigendecompositions were of float32."""
    values, vectors = np.linalg.eigh(a.covariance.astype(np.float32))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance.astype(np.float32) @ root)
    trace_root = np.sqrt(np.maximum(product, 0.0)).sum(dtype=np.float64)
    return float(np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * trace_root)


def torch_fidelity_distance() -> Callable[[Moments, Moments], float] | None:
    try:
        for name in TORCHVISION:
            sys.modules.setdefault(name, MagicMock(__path__=[]))
        fid = importlib.import_module("torch_fidelity.metric_fid")
    except ModuleNotFoundError:
        return None

    def distance(a: Moments, b: Moments) -> float:
        statistics = ({"mu": m.mean, "sigma": m.covariance} for m in (a, b))
        return fid.fid_statistics_to_metric(*statistics, False)[fid.KEY_METRIC_FID]

    return distance


def frechet_routes(dimension: int, rng: np.random.Generator) -> dict[str, Any]:
    """Seconds and error of every route."""
    a, b, truth = commuting_pair(dimension, rng)
    seconds_of_root, to_a = timed(lambda: DistanceTo(a))
    routes: dict[str, Callable[[], float]] = {
        "ours": lambda: frechet_distance(a, b),
        "ours, the reference's root known": lambda: to_a.of_moments(b),
        "ours with float32 eigendecompositions": lambda: with_float32(a, b),
        "scipy.linalg.sqrtm": lambda: with_sqrtm(a, b),
    }
    theirs = torch_fidelity_distance()
    if theirs is not None:
        routes["torch-fidelity"] = lambda: theirs(a, b)
    rows = {}
    for name, route in routes.items():
        seconds, distance = timed(route)
        rows[name] = {"seconds": seconds, "distance": distance, "error": distance - truth}
    return {"dimension": dimension, "true_distance": truth, "seconds_of_the_reference_root": seconds_of_root} | {
        "routes": rows
    }


def accumulation(dimension: int, rng: np.random.Generator, num_blocks: int = 4) -> dict[str, Any]:
    """Rows a second of `add_block` with all it does: to the device, squares, back, merge."""
    block = rng.exponential(size=(MAX_BLOCK_ROWS, dimension)).astype(np.float32)
    valid = np.ones(MAX_BLOCK_ROWS, bool)
    state = add_block(start(np.ones(dimension)), block, valid)  # compiles
    begin = time.perf_counter()
    for _ in range(num_blocks):
        state = add_block(state, block, valid)
    seconds = time.perf_counter() - begin
    return {"dimension": dimension, "block_rows": MAX_BLOCK_ROWS, "rows_per_second": num_blocks * len(block) / seconds}


def balls(dimension: int, rng: np.random.Generator, num_vectors: int = 2000) -> dict[str, Any]:
    """Seconds of the manifolds of two sets, and of precision and recall on them."""
    x, y = rng.exponential(size=(2, num_vectors, dimension)).astype(np.float32)
    manifold(x)  # compiles
    seconds_of_manifolds, (samples, reference) = timed(lambda: (manifold(x), manifold(y)))
    precision_recall(samples, reference)
    seconds, _ = timed(lambda: precision_recall(samples, reference))
    return {
        "dimension": dimension,
        "vectors_in_each_set": num_vectors,
        "seconds_of_both_manifolds": seconds_of_manifolds,
        "seconds_of_precision_and_recall": seconds,
    }


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dimension", type=int, default=2048, help="dimensions of the features")
    parser.add_argument("--results", type=Path, default=root / "results/metrics_cpu.json", help="JSON file to write")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    content = {
        "environment": environment() | {"command": " ".join(["python", *map(shlex.quote, sys.argv)])},
        "frechet": frechet_routes(arguments.dimension, rng),
        "accumulation": accumulation(arguments.dimension, rng),
        "manifold": balls(arguments.dimension, rng),
    }
    storage.write_json(arguments.results, content)
    for name, row in content["frechet"]["routes"].items():
        print(f"{name:40s} {row['seconds']:7.2f} s   error {row['error']:+.2e}")
    print(f"moments: {content['accumulation']['rows_per_second']:.0f} rows/s")
    print(f"written: {arguments.results}")


if __name__ == "__main__":
    main()
