"""Descriptions and fine-tuning: what may change from the source to the new run, and where the null embedding starts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nag_jax import loading
from nag_jax.checkpoint import Checkpoints
from nag_jax.config import Config
from nag_jax.denoiser import LatentSpace
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.errors import UserError
from nag_jax.loading import ModelDescription
from nag_jax.models.dit import ModelConfig, init_params
from nag_jax.training.state import init_state

CONTROL = ModelDescription(
    model=ModelConfig(depth=1, hidden_size=16, num_heads=2),
    process=ProcessConfig("linear"),
    num_classes=3,
    sample_shape=(4, 4, 1),
    has_null_noise=False,
)
WITH_NAG = dataclasses.replace(CONTROL, has_null_noise=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder of a network that never dropped its noise condition."""
    folder = tmp_path_factory.mktemp("source")
    params = jax.jit(lambda key: init_params(CONTROL.network(), key))(jax.random.key(0))
    loading.write_description(folder, CONTROL)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(init_state(params, optax.sgd(0.1)))
    return folder


def test_a_description_survives_its_file(tmp_path: Path):
    loading.write_description(tmp_path, WITH_NAG)
    assert loading.read_description(tmp_path) == WITH_NAG


def test_loaded_networks_are_called_as_they_were_trained(source: Path):
    denoiser = loading.load(source)
    assert denoiser.prediction == "velocity" and not denoiser.has_null_noise and denoiser.num_classes == 3
    x = jnp.ones((2, 4, 4, 1))
    value = denoiser(denoiser.params, x, jnp.float32(0.5), jnp.zeros(2, jnp.int32)).value
    assert value.shape == x.shape


def test_an_attention_that_is_not_here_is_replaced(source: Path, tmp_path: Path):
    """Where cuDNN's was trained with, XLA's answers on a CPU."""
    folder = tmp_path / "from_a_gpu"
    shutil.copytree(source, folder)
    model = dataclasses.replace(CONTROL.model, dtype="bfloat16", attention="cudnn")
    loading.write_description(folder, dataclasses.replace(CONTROL, model=model))
    denoiser = loading.load(folder)
    assert denoiser.apply.model.attention == "xla"


def test_an_unused_null_embedding_starts_at_the_mean_of_the_time_mlp(source: Path):
    before = loading.read_params(source, "ema")
    params = loading.read_for_fine_tuning(source, WITH_NAG, "ema", seed=0)
    t = (np.arange(1000) + 0.5) / 1000
    expected = np.mean([loading.time_embeddings(CONTROL, before, jnp.float32(time)[None])[0] for time in t[::20]], 0)
    np.testing.assert_allclose(params["null_noise_embedding"], expected, rtol=2e-3, atol=2e-5)
    for name in before.keys() - {"null_noise_embedding"}:
        jax.tree.map(np.testing.assert_array_equal, params[name], before[name])


@pytest.mark.parametrize("init", loading.NULL_NOISE_INITS)
def test_a_null_embedding_chosen_by_conversion_is_kept(source: Path, tmp_path: Path, init: str):
    converted = tmp_path / "converted"
    shutil.copytree(source, converted)
    loading.write_description(converted, dataclasses.replace(CONTROL, null_noise_init=init))
    params = loading.read_for_fine_tuning(converted, WITH_NAG, "ema", seed=0)
    jax.tree.map(np.testing.assert_array_equal, params, loading.read_params(source, "ema"))


def test_a_new_null_embedding_is_a_mean_a_draw_or_zeros():
    wide = dataclasses.replace(CONTROL, model=ModelConfig(depth=1, hidden_size=1024, num_heads=2))
    rng = np.random.default_rng(1)
    layers = {"mlp_0": 256, "mlp_2": 1024}
    kernels = {name: 0.02 * rng.standard_normal((inputs, 1024), np.float32) for name, inputs in layers.items()}
    params = {"t_embedder": {name: {"kernel": k, "bias": k[0]} for name, k in kernels.items()}}
    mean = loading.initial_null_noise(wide, params, "mean")
    levels = jnp.asarray((np.arange(1000) + 0.5) / 1000, jnp.float32)
    embeddings = np.asarray(loading.time_embeddings(wide, params, levels), np.float64)
    np.testing.assert_allclose(mean, embeddings.mean(axis=0), atol=1e-6)
    normal = loading.initial_null_noise(wide, params, "normal")
    assert abs(normal.mean()) < 5 * 0.02 / 32 and abs(normal.std() / 0.02 - 1) < 5 / np.sqrt(2 * 1024)
    np.testing.assert_array_equal(normal, loading.initial_null_noise(wide, params, "normal"))
    np.testing.assert_array_equal(loading.initial_null_noise(wide, params, "zeros"), np.zeros(1024, np.float32))
    assert {mean.dtype, normal.dtype} == {np.dtype(np.float32)} and mean.shape == normal.shape == (1024,)
    with pytest.raises(UserError, match="'ones'.*mean, normal, zeros"):
        loading.initial_null_noise(wide, params, "ones")


def test_a_trained_null_embedding_and_a_control_keep_it(source: Path, tmp_path: Path):
    same = loading.read_for_fine_tuning(source, CONTROL, "params", seed=0)
    jax.tree.map(np.testing.assert_array_equal, same, loading.read_params(source, "params"))


def test_another_process_or_architecture_is_refused(source: Path):
    for change in (
        {"process": ProcessConfig("gvp")},
        {"output": "noise"},
        {"model": dataclasses.replace(CONTROL.model, depth=2)},
        {"sample_shape": (8, 8, 1)},
    ):
        with pytest.raises(UserError, match=f"its {next(iter(change))}(.depth)? is"):
            loading.read_for_fine_tuning(source, dataclasses.replace(CONTROL, **change), "ema", seed=0)
    compute = dataclasses.replace(CONTROL.model, dtype="bfloat16", remat="full")
    loading.read_for_fine_tuning(source, dataclasses.replace(CONTROL, model=compute), "ema", seed=0)


def test_other_classes_get_new_rows_and_the_null_class_stays(source: Path):
    before = loading.read_params(source, "ema")["y_embedder"]["embedding"]
    other = dataclasses.replace(CONTROL, num_classes=500)
    after, again, another = (
        loading.read_for_fine_tuning(source, other, "ema", seed)["y_embedder"]["embedding"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(after, again)
    np.testing.assert_array_equal(after[-1], before[-1])
    assert after.shape == (501, 16) and not np.array_equal(after[:-1], another[:-1])
    assert np.std(after[:-1]) == pytest.approx(0.02, rel=0.05)


def test_blocks_take_the_layout_of_the_new_run(source: Path):
    unrolled = dataclasses.replace(CONTROL, model=dataclasses.replace(CONTROL.model, scan_blocks=False))
    stacked, separate = (
        loading.read_for_fine_tuning(source, description, "ema", seed=0) for description in (CONTROL, unrolled)
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), stacked["blocks"], separate["blocks_0"])


def test_latents_of_another_space_are_refused():
    ours = LatentSpace(encoder_hash="a")
    loading.check_latent(ours, LatentSpace(encoder_hash="a"), "net")
    loading.check_latent(LatentSpace(), ours, "net")  # a published network does not name its encoder
    with pytest.raises(UserError, match="encoder_hash a, but these have b"):
        loading.check_latent(ours, LatentSpace(encoder_hash="b"), "net")
    with pytest.raises(UserError, match="scaling_factor 0.18215, but these have 0.13"):
        loading.check_latent(LatentSpace(), LatentSpace(scaling_factor=0.13), "net")
    with pytest.raises(UserError, match="works on images, but the data are latents"):
        loading.check_latent(None, ours, "net")


def test_the_description_of_a_config_says_what_was_trained():
    described = loading.describe(Config(), num_classes=10, sample_shape=(8, 8, 1))
    assert described.network_time == "t" and described.output == "velocity" and described.has_null_noise
    ddpm = dataclasses.replace(Config(), process=ProcessConfig("ddpm"))
    assert loading.describe(ddpm, num_classes=10, sample_shape=(8, 8, 1)).network_time == "1000 t - 1"
