"""Autoencoders from diffusers' folders and files to folders that are read again, with the right name and size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from nag_jax.autoencoder import made_up_autoencoder, read_autoencoder
from nag_jax.convert import torch_file
from nag_jax.convert.__main__ import main
from nag_jax.convert.diffusers_vae import recognise_name
from nag_jax.convert.source import read_source
from nag_jax.models.vae import VaeConfig
from nag_jax.models.vae_table import to_torch_state_dict


def test_a_folder_is_read_again(vae_folder: Path, tmp_path: Path, capsys):
    assert main([str(vae_folder), str(tmp_path / "vae")]) == 0
    assert "autoencoder mse" in capsys.readouterr().out
    found, expected = read_autoencoder(tmp_path / "vae"), made_up_autoencoder()
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.description.config == expected.description.config
    assert found.description.fingerprint == expected.description.fingerprint and found.description.name == "mse"
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["vae.json", "vae.safetensors"]


def test_a_file_alone_tells_its_size(tmp_path: Path):
    config = VaeConfig(block_out_channels=(32, 64), layers_per_block=1)
    made_up = made_up_autoencoder(config)
    torch_file.write_state_dict(tmp_path / "first.bin", to_torch_state_dict(made_up.params, config))
    assert main([str(tmp_path / "first.bin"), str(tmp_path / "vae"), "--kind=vae", "--name=mine"]) == 0
    found = read_autoencoder(tmp_path / "vae").description
    assert found.config == config and found.name == "mine" and found.fingerprint == made_up.description.fingerprint


def test_the_path_tells_the_name(tmp_path: Path):
    for path, name in (
        ("sd-vae-ft-ema", "ema"),
        ("models--stabilityai--sd-vae-ft-mse/snapshots/31f26fd/diffusion_pytorch_model.safetensors", "mse"),
        ("vae-ft-mse-840000-ema-pruned.safetensors", "mse"),
        ("ema/my-vae-1.5", "my-vae-1.5"),
        ("DiT-XL-2-256/vae", "DiT-XL-2-256"),
        ("mine/diffusion_pytorch_model.bin", "mine"),
        ("schema-vae", "schema-vae"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith((".safetensors", ".bin")):
            (tmp_path / path).touch()
        assert recognise_name(tmp_path / path) == name


def test_another_network_is_named(vae_folder: Path, diffusers_folder: Path, official, tmp_path: Path, capsys):
    torch_file.write_state_dict(tmp_path / "dit.pt", official)
    for source, flag, words in (
        (tmp_path / "dit.pt", "--kind=vae", "holds no autoencoder"),
        (diffusers_folder, "--kind=vae", "holds no autoencoder"),
        (vae_folder, "--kind=dit", "holds an autoencoder, not a DiT or SiT"),
        (vae_folder, "--kind=sit", "holds an autoencoder, not a DiT or SiT"),
        (vae_folder, "--init=zeros", "--init is for a DiT or SiT"),
        (diffusers_folder, "--name=x", "--name is for an autoencoder"),
    ):
        assert main([str(source), str(tmp_path / "vae"), flag]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "vae").exists()


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes the tensors of a folder in place."""
    tensors = dict(read_source(folder).tensors)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"quant_conv.bias": t["quant_conv.bias"].astype(np.float16)}), "quant_conv.bias (float16)"),
        (lambda t: t.update({"encoder.conv_in.weight": t["quant_conv.bias"]}), "encoder.conv_in.weight [8], expected"),
        (lambda t: t.pop("encoder.conv_out.bias"), "lack encoder.conv_out.bias"),
        (lambda t: t.update({"encoder.conv_inn.bias": t.pop("encoder.conv_in.bias")}), "lack encoder.conv_in.bias"),
    ],
)
def test_wrong_tensors_are_named(vae_folder: Path, tmp_path: Path, capsys, change, words):
    rewrite(vae_folder, change)
    assert main([str(vae_folder), str(tmp_path / "vae")]) == 2
    error = capsys.readouterr().err
    assert words in error and str(vae_folder) in error
    assert not (tmp_path / "vae").exists()


def test_a_file_cut_short_leaves_nothing(vae_folder: Path, tmp_path: Path, capsys):
    path = vae_folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert main([str(vae_folder), str(tmp_path / "vae")]) == 2
    assert "cut short" in capsys.readouterr().err and not (tmp_path / "vae").exists()


@pytest.mark.parity
def test_bfloat16_of_torch_is_named(vae_folder: Path, tmp_path: Path, capsys):
    torch, torch_format = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    tensors = {name: torch.from_numpy(np.array(a)).bfloat16() for name, a in read_source(vae_folder).tensors.items()}
    torch_format.save_file(tensors, vae_folder / "diffusion_pytorch_model.safetensors")
    assert main([str(vae_folder), str(tmp_path / "vae")]) == 2
    assert "(bfloat16). Give the weights as they were trained" in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_folder_of_diffusers_is_converted_whole(tmp_path: Path, safe_serialization):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe_serialization)
    assert main([str(tmp_path / "theirs"), str(tmp_path / "vae")]) == 0
    ours = read_autoencoder(tmp_path / "vae")
    assert ours.latent.scaling_factor == 0.5 and ours.latent.downsampling == 2 and ours.description.name == "theirs"
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).latent_dist.mean
    mean, _ = ours.encode(images)
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert np.abs(mean - expected).max() <= 1e-5 * np.abs(expected).max()
