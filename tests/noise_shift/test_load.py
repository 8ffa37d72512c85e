"""The measuring estimator of a work folder comes back as it was kept; without one it is said what makes one."""

import jax
import numpy as np
import pytest

import nag_jax
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.errors import UserError
from nag_jax.loading import ModelDescription, write_description
from nag_jax.models.dit import ModelConfig, init_params
from nag_jax.models.noise_estimator import build_estimator, estimator_params
from nag_jax.noise_shift import Calibration, make_estimator, save_estimator

CALIBRATION = Calibration((0.1, 0.9), (0.2, 0.7), (0.05, 0.06))


@pytest.fixture
def description():
    model = ModelConfig(depth=1, hidden_size=16, num_heads=2)
    return ModelDescription(model, ProcessConfig(), num_classes=2, sample_shape=(4, 4, 1))


def keep_estimator(folder, description):
    network = description.network()
    model = build_estimator(network)
    params = estimator_params(init_params(network, jax.random.key(0)), jax.random.key(1), model)
    save_estimator(folder / "estimator", "measure", params, CALIBRATION, {"seed": 3})
    return make_estimator(model, params)


def test_the_kept_estimator_answers_as_before(tmp_path, description):
    write_description(tmp_path / "training", description)
    kept = keep_estimator(tmp_path / "training", description)
    x = np.random.default_rng(0).standard_normal((3, 4, 4, 1)).astype(np.float32)
    loaded, calibration = nag_jax.noise_shift.load(tmp_path / "training")
    assert calibration == CALIBRATION
    for answer, before in zip(
        loaded.posterior.apply(loaded.params, x), kept.posterior.apply(kept.params, x), strict=True
    ):
        np.testing.assert_array_equal(answer, before)


def test_an_estimator_in_another_folder_than_its_network(tmp_path, description):
    write_description(tmp_path / "training", description)
    keep_estimator(tmp_path / "measuring", description)
    with pytest.raises(UserError, match="no folder of a trained network"):
        nag_jax.noise_shift.load(tmp_path / "measuring")
    _, calibration = nag_jax.noise_shift.load(tmp_path / "measuring", checkpoint=tmp_path / "training")
    assert calibration == CALIBRATION


def test_without_an_estimator(tmp_path, description):
    write_description(tmp_path, description)
    with pytest.raises(UserError, match="--mode=noise_shift --checkpoint="):
        nag_jax.noise_shift.load(tmp_path)
