"""The benchmark of the metrics at a small size, and that its published errors are small."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("metrics")


def test_routes_agree_with_the_closed_form_and_float32_does_not(benchmark):
    rng = np.random.default_rng(0)
    a, b, truth = benchmark.commuting_pair(60, rng)
    assert benchmark.frechet_distance(a, b) == pytest.approx(truth, abs=1e-10)
    assert benchmark.with_sqrtm(a, b) == pytest.approx(truth, abs=1e-8)
    assert abs(benchmark.with_float32(a, b) - truth) > 1e-6


def test_the_measurements_run(benchmark):
    rng = np.random.default_rng(0)
    assert benchmark.accumulation(8, rng, num_blocks=1)["rows_per_second"] > 0
    assert benchmark.balls(8, rng, num_vectors=50)["seconds_of_precision_and_recall"] > 0


def test_published_errors():
    routes = json.loads((ROOT / "results/metrics_cpu.json").read_text())["frechet"]["routes"]
    assert abs(routes["ours"]["error"]) < 1e-8
    assert abs(routes["torch-fidelity"]["distance"] - routes["ours"]["distance"]) < 1e-8
