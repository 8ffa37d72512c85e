"""The command from file to folder and back, and converted networks against the torch network they came from."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import nag_jax
from nag_jax import loading
from nag_jax.autoencoder import made_up_autoencoder, read_autoencoder, write_autoencoder
from nag_jax.checkpoint import Checkpoints
from nag_jax.convert import tables, torch_file
from nag_jax.convert.__main__ import main
from nag_jax.convert.network import recognise_kind
from nag_jax.errors import UserError
from nag_jax.models.dit import init_params, stack_blocks
from nag_jax.models.vae import VaeConfig
from nag_jax.training.state import init_state


@pytest.fixture
def weights(official, tmp_path: Path) -> Path:
    torch_file.write_state_dict(tmp_path / "tiny.pt", official)
    return tmp_path / "tiny.pt"


def test_there_and_back_is_bit_identical(weights: Path, official, tmp_path: Path, capsys):
    folder, back = tmp_path / "network", tmp_path / "back.pt"
    assert main([str(weights), str(folder), "--kind=sit", "--num_heads=4"]) == 0
    assert main([str(folder), str(back), "--to=sit"]) == 0
    assert back.read_bytes() == weights.read_bytes()
    assert main([str(folder), str(tmp_path / "kept.pt"), "--to=sit", "--keep_null_noise", "--weights=model"]) == 0
    kept = torch_file.state_dict(tmp_path / "kept.pt")
    np.testing.assert_array_equal(kept["null_noise_embedding"], nag_jax.load(folder).params["null_noise_embedding"])
    said = f"written: {tmp_path / 'kept.pt'} (official sit, with the null noise embedding)"
    assert capsys.readouterr().out.splitlines()[-1] == said

    denoiser = nag_jax.load(folder)
    assert denoiser.prediction == "velocity" and denoiser.process.name == "linear"
    assert denoiser.has_null_label and not denoiser.has_null_noise

    # Fine-tuning starts from the tensors of the folder, the new null noise embedding included.
    with_nag = dataclasses.replace(loading.read_description(folder), has_null_noise=True)
    start = loading.read_for_fine_tuning(folder, with_nag, "ema", seed=0)
    jax.tree.map(np.testing.assert_array_equal, start, denoiser.params)


def test_mistakes_leave_with_code_2_and_one_sentence(weights: Path, tmp_path: Path, capsys):
    folder = tmp_path / "network"
    for arguments, words in (
        ([str(weights), str(folder)], "--kind=dit or --kind=sit"),
        ([str(weights), str(folder), "--kind=dit"], "--num_heads"),
        ([str(weights), str(folder), "--kind=dit", "--num_heads=4", "--keep_null_noise"], "goes with --to"),
        ([str(folder), str(weights), "--to=dit"], "exists already"),
        ([str(folder), str(tmp_path / "new.pt"), "--to=dit"], "model.json"),
        ([str(folder), str(tmp_path / "new.pt"), "--to=dit", "--kind=dit"], "--kind is for reading"),
        ([str(folder), str(tmp_path / "new.pt"), "--to=dit", "--init=mean"], "--init is for reading"),
        ([str(folder), str(tmp_path / "new.pt"), "--to=dit", "--vae=x"], "--vae is for reading"),
        ([str(weights), str(folder), "--kind=dit", "--num_heads=4", "--name=x"], "--name is for an autoencoder"),
        ([str(tmp_path / "absent.pt"), str(folder)], "does not exist"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
        assert not folder.exists()
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    assert main([str(weights), str(folder), "--kind=dit", "--num_heads=4"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_nothing_is_written_over_and_mistakes_leave_nothing(weights: Path, official, tmp_path: Path, capsys):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    assert main([str(weights), str(used), "--kind=dit", "--num_heads=4"]) == 2
    assert "exists already" in capsys.readouterr().err and [path.name for path in used.iterdir()] == ["notes.txt"]

    cut, folder, old = tmp_path / "cut-dit.pt", tmp_path / "network", tmp_path / "old.pt"
    cut.write_bytes(weights.read_bytes()[:-100])
    assert main([str(cut), str(folder)]) == 2 and not folder.exists()
    assert "cut short or damaged" in capsys.readouterr().err
    torch_file.write_state_dict(old, official)
    before = old.read_bytes()
    with pytest.raises(ZeroDivisionError):
        torch_file.write_state_dict(old, BreaksOff(official))
    assert old.read_bytes() == before and not list(tmp_path.glob(".*"))


class BreaksOff(dict[str, np.ndarray]):
    """A state dict whose last tensor cannot be had."""

    def values(self) -> Any:
        yield from list(super().values())[:-1]
        yield 1 / 0


def test_official_safetensors_are_the_same_network(weights: Path, official, tmp_path: Path):
    safetensors.numpy.save_file(official, tmp_path / "SiT-tiny.safetensors")
    assert main([str(tmp_path / "SiT-tiny.safetensors"), str(tmp_path / "network"), "--num_heads=4"]) == 0
    assert main([str(tmp_path / "network"), str(tmp_path / "back.pt"), "--to=sit"]) == 0
    assert (tmp_path / "back.pt").read_bytes() == weights.read_bytes()
    assert {path.name for path in (tmp_path / "network").iterdir()} == {"model.json", "checkpoints"}


def test_the_start_of_the_null_noise_embedding_is_recorded(weights: Path, tmp_path: Path, capsys):
    arguments = ["--kind=dit", "--num_heads=4"]
    for init in loading.NULL_NOISE_INITS:
        folder = tmp_path / init
        assert main([str(weights), str(folder), f"--init={init}", *arguments]) == 0
        description, params = loading.read_description(folder), loading.read_params(folder, "ema")
        assert description.null_noise_init == init
        expected = loading.initial_null_noise(description, params, init)
        np.testing.assert_array_equal(params["null_noise_embedding"], expected)
    assert main([str(tmp_path / "zeros"), str(tmp_path / "kept.pt"), "--to=dit", "--keep_null_noise"]) == 0
    assert main([str(tmp_path / "kept.pt"), str(tmp_path / "again"), "--init=mean", *arguments]) == 2
    assert "leave out --init" in capsys.readouterr().err
    assert main([str(tmp_path / "kept.pt"), str(tmp_path / "again"), *arguments]) == 0
    again = loading.read_description(tmp_path / "again")
    assert again.has_null_noise and again.null_noise_init == ""
    assert not loading.read_params(tmp_path / "again", "params")["null_noise_embedding"].any()


def test_the_autoencoder_of_the_latents_is_recorded(weights: Path, vae_folder: Path, tmp_path: Path, capsys):
    vae, arguments = tmp_path / "vae", ["--kind=sit", "--num_heads=4"]
    assert main([str(vae_folder), str(vae)]) == 0
    assert main([str(weights), str(tmp_path / "network"), f"--vae={vae}", *arguments]) == 0
    assert nag_jax.load(tmp_path / "network").latent == read_autoencoder(vae).latent
    other = made_up_autoencoder(VaeConfig(latent_channels=3, block_out_channels=(8,), norm_groups=4))
    write_autoencoder(tmp_path / "other", other)
    for folder, words in (
        (tmp_path / "other", "latents of 3 channels"),
        (tmp_path / "network", "holds no autoencoder"),
        (vae_folder, "python -m nag_jax.convert"),
    ):
        assert main([str(weights), str(tmp_path / "new"), f"--vae={folder}", *arguments]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("scan_blocks", [True, False])
def test_a_training_folder_is_exported(tmp_path: Path, scan_blocks: bool):
    description = tables.describe(
        "dit",
        depth=2,
        hidden_size=16,
        num_heads=2,
        patch_size=2,
        learn_sigma=True,
        num_classes=3,
        sample_shape=(4, 4, 4),
        null_noise_init="",
    )
    description = dataclasses.replace(
        description, model=dataclasses.replace(description.model, scan_blocks=scan_blocks, dtype="bfloat16")
    )
    start = jax.jit(lambda key: init_params(description.network(), key))(jax.random.key(0))
    average = jax.tree.map(lambda leaf: leaf + 1, start)
    state = dataclasses.replace(init_state(start, optax.adam(0.1), ("ema",)), ema={"ema": average})
    folder = tmp_path / "run"
    loading.write_description(folder, description)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state)
    for weights, expected in (("ema", average), ("model", start)):
        file = tmp_path / f"{weights}.pt"
        assert main([str(folder), str(file), "--to=dit", f"--weights={weights}", "--keep_null_noise"]) == 0
        tensors = torch_file.state_dict(file)
        found = tables.recognise(tensors, "dit", source="file", num_heads=2)
        assert found.num_classes == 3 and found.sample_shape == (4, 4, 4) and found.has_null_noise
        params = tables.import_params(tensors, found, source="file")
        stacked = expected if scan_blocks else stack_blocks(expected)
        jax.tree.map(np.testing.assert_array_equal, params, stacked)


def test_the_kind_is_what_settings_or_the_name_say():
    assert recognise_kind("/sit/DiT-XL-2-256x256.pt", {}) == "dit"
    assert recognise_kind("SiT-XL-2-256x256.pt", {}) == "sit"
    assert recognise_kind("0400000.pt", {"model": "DiT-XL/2"}) == "dit"
    assert recognise_kind("dit.pt", {"model": "SiT-B/4", "path_type": "Linear", "prediction": "velocity"}) == "sit"
    with pytest.raises(UserError, match="path_type GVP"):
        recognise_kind("w.pt", {"path_type": "GVP"})
    with pytest.raises(UserError, match="Give --kind"):
        recognise_kind("transition_edits.pt", {})


@pytest.mark.parity
@pytest.mark.parametrize("kind", tables.KINDS)
def test_a_converted_network_answers_as_the_torch_network(torch_dit, tmp_path: Path, kind):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    average, trained = (
        torch_dit.TorchDiT(size=8, channels=4, patch=2, hidden=32, depth=2, heads=4, num_classes=5) for _ in range(2)
    )
    for network in (average, trained):
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                torch.nn.init.normal_(parameter, std=0.15)  # gates and the final layer too
    arguments = argparse.Namespace(model=f"{'DiT' if kind == 'dit' else 'SiT'}-tiny/2")
    checkpoint = {"model": trained.state_dict(), "ema": average.state_dict(), "opt": {"state": {}}, "args": arguments}
    torch.save(checkpoint, tmp_path / "0001000.pt")
    assert main([str(tmp_path / "0001000.pt"), str(tmp_path / "network"), "--num_heads=4"]) == 0
    denoiser = nag_jax.load(tmp_path / "network")

    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 8, 8, 4), np.float32)
    t = np.array([0.001, 0.25, 0.5, 1.0], np.float32)
    labels, dropped = np.array([0, 4, 2, 3], np.int32), np.array([False, True, False, False])
    with jax.default_matmul_precision("highest"):
        prediction = denoiser(denoiser.params, jnp.asarray(x), t, labels, drop_label=dropped)
    # DiT counts its 1000 noise levels from 0; SiT's time runs from noise to data, and so does its velocity.
    network_time = 1000 * t - 1 if kind == "dit" else 1 - t
    with torch.no_grad():
        output = average(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(network_time),
            torch.from_numpy(np.where(dropped, 5, labels)).long(),
        )
    value, variance = np.split(output.numpy().transpose(0, 2, 3, 1), 2, axis=-1)
    expected = value if kind == "dit" else -value
    assert denoiser.prediction == ("noise" if kind == "dit" else "velocity")
    assert np.abs(prediction.value - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(prediction.variance - variance).max() <= 1e-5 * np.abs(variance).max()

    # The file holds the same tensors again, and torch loads them into its network.
    assert main([str(tmp_path / "network"), str(tmp_path / "back.pt"), f"--to={kind}"]) == 0
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    trained.load_state_dict(state)
    for name, value in average.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(state[name], value), name
    np.testing.assert_allclose(state["pos_embed"], average.pos_embed.detach(), atol=1e-6)
