"""The command from file to folder and back, and converted networks against the torch network they came from."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nag_jax
from nag_jax import loading
from nag_jax.convert import tables, torch_file
from nag_jax.convert.__main__ import main
from nag_jax.convert.network import recognise_kind
from nag_jax.errors import UserError


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
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path / 'kept.pt'} (official sit)"

    denoiser = nag_jax.load(folder)
    assert denoiser.prediction == "velocity" and denoiser.process.name == "linear"
    assert denoiser.has_null_label and not denoiser.has_null_noise

    # Fine-tuning starts from the tensors of the folder, the new null noise embedding included.
    with_nag = dataclasses.replace(loading.read_description(folder), has_null_noise=True)
    start = loading.read_for_fine_tuning(folder, with_nag, "ema")
    jax.tree.map(np.testing.assert_array_equal, start, denoiser.params)


def test_mistakes_leave_with_code_2_and_one_sentence(weights: Path, tmp_path: Path, capsys):
    folder = tmp_path / "network"
    for arguments, words in (
        ([str(weights), str(folder)], "--kind=dit or --kind=sit"),
        ([str(weights), str(folder), "--kind=dit"], "--num_heads"),
        ([str(weights), str(folder), "--kind=dit", "--num_heads=4", "--keep_null_noise"], "goes with --to"),
        ([str(folder), str(weights), "--to=dit"], "exists already"),
        ([str(folder), str(tmp_path / "new.pt"), "--to=dit"], "model.json"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
        assert not folder.exists()
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    assert main([str(weights), str(folder), "--kind=dit", "--num_heads=4"]) == 2
    assert "exists already" in capsys.readouterr().err


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
