"""The shift benchmark at a small size, and its published tables against its published results."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("shift_oracle")


def test_sampler_and_equations_agree(benchmark):
    process, prediction = benchmark.PROCESSES[0]
    settings = benchmark.Settings(
        num_steps=85, num_levels=32, num_radii=2, score_errors=(-0.05, 0.0, 0.05), nag_scales=(1.0,)
    )
    cases = benchmark.run_case(benchmark.Case(benchmark.DATA["narrow"], process, prediction, settings))
    assert [(case["null"], case["nag_scale"]) for case in cases] == [
        ("none", 0.0), ("posterior", 1.0), ("network (velocity)", 1.0)
    ]  # fmt: skip
    for case in cases:
        np.testing.assert_allclose(case["shift"], case["equation_shift"], atol=1e-3)
        np.testing.assert_allclose(case["variance_ratio"], case["equation_variance_ratio"], rtol=1e-2)
    # No error and no guidance: no shift. Too small a score leaves too much noise, too large a one too little.
    np.testing.assert_allclose(cases[0]["equation_shift"][1], 0.0, atol=1e-12)
    assert (cases[0]["shift"][0] > 0.0).all() and (cases[0]["shift"][2] < 0.0).all()


def test_documented_tables_are_those_of_the_results(benchmark):
    results = json.loads((ROOT / "results/shift_oracle.json").read_text())
    document = (ROOT / "docs/method.md").read_text()
    for table in benchmark.tables(results["summary"]).split("\n\n"):
        assert table in document
