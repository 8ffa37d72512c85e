"""An estimator comes back bit for bit, to whom it was trained for alone, and damage is said."""

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.process import DDPM, GVP, Linear
from nag_jax.errors import UserError
from nag_jax.models.dit import ModelConfig, build_model
from nag_jax.models.noise_estimator import build_estimator
from nag_jax.noise_shift.calibration import Calibration
from nag_jax.noise_shift.estimator import EstimatorConfig
from nag_jax.noise_shift.store import estimator_conditions, load_estimator, read_estimator, save_estimator
from nag_jax.params_hash import params_hash

PARAMS = {"trunk": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, "head": {"bias": np.float32([0.5, -2.5])}}
CALIBRATION = Calibration((0.1, 0.9), (0.2, 0.7), (0.05, 0.06))
MODEL = build_estimator(
    build_model(ModelConfig(depth=1, hidden_size=16, num_heads=2), input_shape=(4, 4, 1), num_classes=2)
)


def conditions(model=MODEL, trunk_hash="abc", process=None, config=None, seed=1, **data):
    return estimator_conditions(
        model, trunk_hash, process or Linear(), config if config is not None else EstimatorConfig(), seed, **data
    )


def test_round_trip(tmp_path):
    folder = tmp_path / "estimator"
    assert load_estimator(folder, "measure", conditions()) is None
    save_estimator(folder, "measure", PARAMS, CALIBRATION, conditions())
    params, calibration = load_estimator(folder, "measure", conditions())
    assert params_hash(params) == params_hash(PARAMS) and calibration == CALIBRATION
    assert load_estimator(folder, "guide", conditions()) is None


def test_reused_only_under_the_same_conditions(tmp_path):
    save_estimator(tmp_path, "measure", PARAMS, CALIBRATION, conditions())
    other_heads = build_estimator(MODEL.trunk.clone(num_heads=4))
    for other in (
        conditions(trunk_hash="abd"),
        conditions(config=EstimatorConfig(num_steps=7)),
        conditions(seed=2),
        conditions(process=GVP()),
        conditions(model=other_heads),
        conditions(training_data="another set"),
    ):
        assert load_estimator(tmp_path, "measure", other) is None
    assert conditions(process=DDPM(num_levels=10)) != conditions(process=DDPM())
    assert load_estimator(tmp_path, "measure", conditions()) is not None
    save_estimator(tmp_path, "measure", PARAMS, CALIBRATION, conditions(seed=2))
    assert load_estimator(tmp_path, "measure", conditions()) is None


def test_another_calibration_alone_keeps_the_parameters(tmp_path):
    on_half, on_all = ({"num_images": count} for count in (50, 100))
    save_estimator(tmp_path, "measure", PARAMS, CALIBRATION, conditions(calibration=on_half))
    params, calibration = load_estimator(tmp_path, "measure", conditions(calibration=on_all))
    assert params_hash(params) == params_hash(PARAMS) and calibration is None
    assert load_estimator(tmp_path, "measure", conditions(calibration=on_half))[1] == CALIBRATION
    assert load_estimator(tmp_path, "measure", conditions(calibration=on_all, seed=2)) is None


def test_read_whatever_the_conditions_and_without_a_calibration(tmp_path):
    assert read_estimator(tmp_path, "guide") is None
    save_estimator(tmp_path, "guide", PARAMS, None, conditions(seed=7))
    params, calibration = read_estimator(tmp_path, "guide")
    assert params_hash(params) == params_hash(PARAMS) and calibration is None


@pytest.mark.parametrize("name", ["measure.json", "measure.npz"])
@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_damage_names_the_file_and_the_remedy(tmp_path, name, how):
    save_estimator(tmp_path, "measure", PARAMS, CALIBRATION, conditions())
    path = tmp_path / name
    content = path.read_bytes()
    # Past the middle of the JSON lies the parameters' hash or the calibration; in the archive, data or directory.
    at = 3 * len(content) // 4 if name.endswith("json") else content.index(PARAMS["head"]["bias"].tobytes())
    damaged = {"cut": content[:at], "flipped": content[:at] + b"\xff" + content[at + 1 :], "empty": b""}
    path.write_bytes(damaged[how])
    with pytest.raises(UserError, match=f"{name}.*Delete.*measure.json.*trained anew"):
        load_estimator(tmp_path, "measure", conditions())


def test_arrays_of_another_estimator_are_noticed(tmp_path):
    save_estimator(tmp_path, "guide", {"head": {"bias": np.zeros(2)}}, CALIBRATION, conditions())
    save_estimator(tmp_path, "measure", PARAMS, CALIBRATION, conditions())
    (tmp_path / "measure.npz").write_bytes((tmp_path / "guide.npz").read_bytes())
    with pytest.raises(UserError, match="measure.npz"):
        load_estimator(tmp_path, "measure", conditions())
    (tmp_path / "measure.npz").unlink()
    with pytest.raises(UserError, match="measure.npz"):
        load_estimator(tmp_path, "measure", conditions())


def test_hash_is_of_paths_dtypes_shapes_and_bytes():
    a, b = np.arange(6, dtype=np.float32), np.ones(2, np.int32)
    reference = params_hash({"a": a, "b": b})
    assert params_hash({"b": jnp.asarray(b), "a": jnp.asarray(a)}) == reference
    bits_of_a = a.view(np.int32)
    for other in (
        {"a": a, "c": b},
        {"a": b, "b": a},
        {"a": bits_of_a, "b": b},
        {"a": a.reshape(2, 3), "b": b},
        {"a": np.nextafter(a, 9, dtype=np.float32), "b": b},
        {"a": {"a": a}, "b": b},
    ):
        assert params_hash(other) != reference
    assert params_hash({"a": jnp.asarray(a, jnp.bfloat16)}) != params_hash({"a": a})
