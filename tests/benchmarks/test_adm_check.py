"""The check against ADM's evaluator reads its numbers where an evaluation writes them, and sees one that is off."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from nag_jax.config import SamplingConfig
from nag_jax.convert.feature_nets import import_params, torch_table
from nag_jax.metrics.features import FID_NETWORK
from nag_jax.models import inception


@pytest.fixture(scope="module")
def check(load_benchmark):
    return load_benchmark("adm_check")


def test_a_number_that_is_off_is_named(check):
    published = {name: value for name, (value, _) in check.PUBLISHED.items()}
    assert check.far_off(published) == []
    assert check.far_off({**published, "FID": 3.96}) == ["FID"]
    assert check.far_off({**published, "Recall": float("nan")}) == ["Recall"]


def test_every_number_comes_out_of_an_evaluation(
    check, load_benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two small sets in ADM's layouts, judged by FID's network with random weights."""
    rng = np.random.default_rng(0)
    state = load_benchmark("features").random_state()
    feature_net = inception.make_feature_net(import_params(state, torch_table(FID_NETWORK), source="random"))
    monkeypatch.setattr(check.evaluate_samples, "load_feature_net", lambda folder: feature_net)
    for name in ("samples", "reference"):
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    evaluation = check.EvalConfig(feature_net="random", inception_score_order="as_given")
    config = check.Config(eval=evaluation, sampling=SamplingConfig(batch_size=12))
    folder = check.evaluate_samples.run(
        config, tmp_path / "samples.npz", tmp_path / "reference.npz", epath.Path(tmp_path / "w")
    )
    numbers = check.measured(json.loads((folder / "metrics.json").read_text()))
    assert numbers.keys() == check.PUBLISHED.keys()
    assert all(np.isfinite(value) for value in numbers.values())
