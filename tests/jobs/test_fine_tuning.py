"""Fine-tuning a converted latent network: what it starts from, what it keeps, and the methods that need it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import nag_jax
from nag_jax import loading
from nag_jax.autoencoder import made_up_autoencoder, write_autoencoder
from nag_jax.denoiser import LatentSpace
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.loading import ModelDescription
from nag_jax.models.dit import ModelConfig, init_params
from nag_jax.models.vae import VaeConfig
from nag_jax.params_hash import params_hash

IMAGENET_CLASSES, FOOD_CLASSES = 1000, 101
TINY = ModelConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, learn_sigma=True)
DIT = ModelDescription(
    model=TINY,
    process=ProcessConfig("ddpm"),
    num_classes=IMAGENET_CLASSES,
    sample_shape=(4, 4, 4),
    network_time="1000 t - 1",
    output="noise",
    has_null_noise=False,
    null_noise_init="mean",
    latent=LatentSpace(),
)


def converted_folder(folder: Path, description: ModelDescription) -> Path:
    """A folder as conversion makes it, of random tensors, zeros of a fresh network included."""
    shapes = jax.eval_shape(lambda: init_params(description.network(), jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    params = [0.05 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    loading.write_network(folder, description, jax.tree.unflatten(tree, params))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_folder(tmp_path_factory.mktemp("converted") / "dit", DIT)


@pytest.fixture(scope="module")
def fine_tuned(converted: Path, runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning whose source is gone before its last step."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    source = folder / "source"
    shutil.copytree(converted, source)
    arguments = [
        "--config=configs/finetune.py:food101,nag,smoke",
        f"--config.init_from={source}",
        "--config.eval.methods=('plain','domain','domain+nag')",
    ]
    runs.finish(folder / "run", *arguments, "--config.num_steps=2", "--config.eval.methods=()")
    shutil.rmtree(source)
    runs.finish(folder / "run", *arguments)
    return folder / "run"


def test_domain_guidance_asks_the_kept_network(fine_tuned: Path, converted: Path):
    (metrics,) = (fine_tuned / "eval" / "step_4").glob("*/metrics.json")
    methods = json.loads(metrics.read_text())["methods"]
    calls = {name: method["evaluations_per_image"] for name, method in methods.items()}
    assert calls == {"plain": 4, "domain": 8, "domain+nag": 12}
    conditions = json.loads((metrics.parent / "conditions.json").read_text())
    kept, source = nag_jax.load(fine_tuned / "original"), nag_jax.load(converted)
    jax.tree.map(np.testing.assert_array_equal, kept.params, source.params)
    assert conditions["original_network"] == params_hash(source.params)
    assert conditions["vae"]["name"] == "made-up"


def test_the_new_head_keeps_the_null_class_and_the_convention(fine_tuned: Path, converted: Path):
    tuned, source = nag_jax.load(fine_tuned, weights="params"), nag_jax.load(converted)
    assert tuned.num_classes == FOOD_CLASSES and source.num_classes == IMAGENET_CLASSES
    assert tuned.apply.network_time == source.apply.network_time == "1000 t - 1"
    assert tuned.has_null_noise and not source.has_null_noise
    embedding = tuned.params["y_embedder"]["embedding"]
    assert embedding.shape == (FOOD_CLASSES + 1, TINY.hidden_size)
    # Four steps of Adam at 1e-4 move no number by more than about that much.
    np.testing.assert_allclose(embedding[-1], source.params["y_embedder"]["embedding"][-1], atol=5e-4)
    assert tuned.latent.encoder_hash == made_up_autoencoder().description.encoder_hash


def test_another_start_than_the_first_is_refused(fine_tuned: Path, converted: Path, runs):
    before = (fine_tuned / "config.json").read_bytes()
    for start in (converted, ""):
        arguments = ["--config=configs/finetune.py:food101,nag,smoke", f"--config.init_from={start}"]
        _, errors = runs.finish(fine_tuned, *arguments, expect=2)
        assert "init_from was" in errors
    assert (fine_tuned / "config.json").read_bytes() == before


def test_a_run_goes_on_after_a_kill_while_the_original_was_kept(converted: Path, runs, tmp_path: Path):
    (tmp_path / "w" / "original" / "checkpoints" / "0").mkdir(parents=True)  # what the kill left
    arguments = ["--config=configs/finetune.py:food101,smoke", f"--config.init_from={converted}"]
    runs.finish(tmp_path / "w", *arguments, "--config.num_steps=2", "--config.eval.methods=()")
    kept, source = nag_jax.load(tmp_path / "w" / "original"), nag_jax.load(converted)
    jax.tree.map(np.testing.assert_array_equal, kept.params, source.params)


def test_the_null_path_of_other_classes_cannot_be_trained_alone(converted: Path, runs, tmp_path: Path):
    arguments = ["--config=configs/finetune.py:food101,nag,smoke", f"--config.init_from={converted}"]
    arguments.append("--config.optimizer.trainable=null_noise_embedding")
    _, errors = runs.finish(tmp_path / "w", *arguments, expect=2)
    assert "has 1000 classes and the data have 101" in errors and not (tmp_path / "w").exists()


def test_the_null_path_alone_can_be_trained(converted: Path, runs, tmp_path: Path):
    runs.finish(
        tmp_path,
        "--config=configs/imagenet256.py:dit_xl2,nag,smoke",
        f"--config.init_from={converted}",
        "--config.optimizer.trainable=null_noise_embedding",
        "--config.objective.noise_dropout=0.5",
        "--config.eval.methods=()",
    )
    tuned, source = nag_jax.load(tmp_path, weights="params").params, nag_jax.load(converted).params
    assert not np.array_equal(tuned.pop("null_noise_embedding"), source.pop("null_noise_embedding"))
    jax.tree.map(np.testing.assert_array_equal, tuned, source)


def test_a_converted_network_is_sampled_without_data(converted: Path, runs, tmp_path: Path):
    write_autoencoder(tmp_path / "vae", made_up_autoencoder())
    arguments = [
        "--mode=sample",
        f"--checkpoint={converted}",
        f"--config.data.vae={tmp_path / 'vae'}",
        "--config.data.mock_examples=0",
        "--config.sampling.label_rule=random",
    ]
    config = ["--config=configs/imagenet256.py:dit_xl2,smoke", "--config.model.dtype=bfloat16"]
    output, _ = runs.finish(tmp_path / "w", *config, *arguments, "--dry_run")
    assert "training data" not in output and not (tmp_path / "w").exists()
    runs.finish(tmp_path / "w", *config, *arguments)
    (folder,) = (tmp_path / "w" / "samples").iterdir()
    with np.load(folder / "samples-cfg.npz") as samples:
        assert samples["arr_0"].shape == (64, 32, 32, 3) and samples["arr_0"].dtype == np.uint8
    assert json.loads((folder / "conditions.json").read_text())["dtype"] == "bfloat16"
    _, errors = runs.finish(tmp_path / "w", *arguments, expect=2)
    assert "holds a converted network, which says nothing of how to sample it. Give --config" in errors


def test_another_autoencoder_than_the_latents_is_refused(fine_tuned: Path, runs, tmp_path: Path):
    other = made_up_autoencoder(VaeConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_groups=4))
    write_autoencoder(tmp_path / "vae", other)
    arguments = ["--mode=sample", f"--checkpoint={fine_tuned}", f"--config.data.vae={tmp_path / 'vae'}"]
    _, errors = runs.finish(tmp_path / "w", *arguments, expect=2)
    assert "encoder_hash" in errors and "another autoencoder" in errors


def test_domain_guidance_without_an_original_is_refused(runs, tmp_path: Path):
    arguments = ["--config=configs/finetune.py:food101,smoke", "--config.eval.methods=('domain',)"]
    _, errors = runs.finish(tmp_path / "w", *arguments, expect=2)
    assert "Domain Guidance needs the network that fine-tuning started from" in errors
    assert not (tmp_path / "w").exists()
