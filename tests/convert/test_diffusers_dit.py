"""Diffusers' DiT: the same network as the official file, the answers of diffusers' class, and what is refused."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nag_jax
from nag_jax.convert import diffusers_dit, tables
from nag_jax.convert.__main__ import main
from nag_jax.errors import UserError


def convert(config, tensors):
    description = diffusers_dit.describe(config, source="folder")
    return description, diffusers_dit.to_official(tensors, description, source="folder")


def test_diffusers_tensors_are_the_official_ones_bit_for_bit(diffusers_config, diffusers_tensors, official):
    description, state = convert(diffusers_config, diffusers_tensors)
    assert state.keys() == official.keys()
    for name, array in official.items():
        assert state[name].shape == array.shape and state[name].tobytes() == array.tobytes(), name
    assert description == tables.recognise(official, "dit", source="w.pt", num_heads=4)


def test_a_folder_goes_out_as_the_official_file(diffusers_folder: Path, official, tmp_path: Path):
    assert main([str(diffusers_folder), str(tmp_path / "network")]) == 0
    assert main([str(tmp_path / "network"), str(tmp_path / "w.pt"), "--to=dit"]) == 0
    state = nag_jax.convert.torch_file.state_dict(tmp_path / "w.pt")
    assert list(state) == list(official)
    assert all(state[name].tobytes() == array.tobytes() for name, array in official.items())


def test_the_published_config_is_a_dit_xl(diffusers_config):
    """Of facebook/DiT-XL-2-512, written when the class had another name and no norm_eps."""
    published = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 72,
        "cross_attention_dim": None,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 64,
        "upcast_attention": False,
        "use_linear_projection": False,
    }
    description = diffusers_dit.describe(published, source="folder")
    assert (description.model.size, description.model.patch_size, description.model.learn_sigma) == ("XL", 2, True)
    assert description.sample_shape == (64, 64, 4) and description.num_classes == 1000
    assert description.network_time == "1000 t - 1" and description.output == "noise"
    del published["norm_type"]  # that class has another default
    with pytest.raises(UserError, match="norm_type=None"):
        diffusers_dit.describe(published, source="folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "describes a PixArtTransformer2DModel"),
        ({"num_layers": None}, "no whole number for num_layers"),
        ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single'"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"norm_eps": 1e-3}, "norm_eps=0.001"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768"),
        ({"out_channels": 12}, "out_channels=12 with in_channels=4"),
        ({"sample_size": 7}, "sample_size=7 with patch_size=2"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(diffusers_config, change, words):
    with pytest.raises(UserError, match=words):
        diffusers_dit.describe(diffusers_config | change, source="folder")


EMBEDDER = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.weight"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (EMBEDDER, lambda a: np.nextafter(a, 1), rf"{EMBEDDER} differs from transformer_blocks\.0"),
        ("transformer_blocks.1.attn1.to_k.bias", lambda a: a[:-1], r"to_k.bias has shape \(31,\), but \(32,\)"),
        ("transformer_blocks.0.ff.net.2.weight", lambda a: a.astype(np.float16), "net.2.weight is float16.*float32"),
        ("proj_out_1.weight", lambda a: None, "proj_out_1.weight is missing"),
        ("transformer_blocks.2.norm1.linear.bias", lambda a: np.zeros(192, np.float32), "no tensor of this network"),
    ],
)
def test_a_wrong_tensor_is_named(diffusers_config, diffusers_tensors, name, change, words):
    changed = change(diffusers_tensors.pop(name, None))
    tensors = diffusers_tensors if changed is None else diffusers_tensors | {name: changed}
    with pytest.raises(UserError, match=words):
        convert(diffusers_config, tensors)


@pytest.mark.parity
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_converted_folder_answers_as_diffusers(tmp_path: Path, safe_serialization):
    """Once diffusers' class has the official time features and epsilon; without them, at network time 0.

    There every cosine is one and every sine zero, whatever the frequencies.
    """
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)  # gates and the output too
    first, second = (block.norm1.emb for block in theirs.transformer_blocks)
    second.load_state_dict(first.state_dict())
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe_serialization)
    assert main([str(tmp_path / "theirs"), str(tmp_path / "network")]) == 0
    denoiser = nag_jax.load(tmp_path / "network")

    x = np.random.default_rng(1).standard_normal((4, 8, 8, 4), np.float32)
    labels, dropped = np.array([0, 4, 2, 3], np.int32), np.array([False, True, False, False])

    def compare(t: np.ndarray) -> None:
        with jax.default_matmul_precision("highest"):
            ours = denoiser(denoiser.params, jnp.asarray(x), t, labels, drop_label=dropped)
        with torch.no_grad():
            answer = theirs(
                torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
                timestep=torch.from_numpy(1000 * t - 1),
                class_labels=torch.from_numpy(np.where(dropped, 5, labels)).long(),
            )
        value, variance = np.split(answer.sample.numpy().transpose(0, 2, 3, 1), 2, axis=-1)
        assert np.abs(ours.value - value).max() <= 1e-5 * np.abs(value).max()
        assert np.abs(ours.variance - variance).max() <= 1e-5 * np.abs(variance).max()

    compare(np.full(4, 0.001, np.float32))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    compare(np.array([0.001, 0.1, 0.3, 0.5], np.float32))
