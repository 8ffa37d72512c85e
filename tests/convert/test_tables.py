"""State dicts against the published names, bit for bit through our layout and back, and every way to be wrong."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from nag_jax import loading
from nag_jax.convert import tables
from nag_jax.denoiser import LatentSpace
from nag_jax.errors import UserError
from nag_jax.models.dit import init_params, unstack_blocks
from nag_jax.models.layers import sincos_positions


def convert(tensors, kind="dit"):
    description = tables.recognise(tensors, kind, source="w.pt", num_heads=4)
    return description, tables.import_params(tensors, description, source="w.pt")


@pytest.mark.parametrize("kind", tables.KINDS)
def test_import_then_export_is_bit_identical(official, kind):
    description, params = convert(official, kind)
    for layout in (params, unstack_blocks(params)):
        back = tables.export_params(layout, description, kind, source="folder")
        assert list(back) == list(official)
        for name, array in official.items():
            assert back[name].dtype == array.dtype and back[name].shape == array.shape
            assert back[name].tobytes() == array.tobytes(), name


def test_the_tree_is_the_networks_own(official):
    description, params = convert(official)
    expected = jax.eval_shape(functools.partial(init_params, description.network()), jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    assert description.sample_shape == (8, 8, 4) and description.num_classes == 5 and description.model.learn_sigma


def test_a_null_noise_embedding_of_the_file_is_kept_or_dropped(official):
    description, params = convert(official, "sit")
    assert not description.has_null_noise and description.null_noise_init == "mean"

    kept = tables.export_params(params, description, "sit", source="folder", keep_null_noise=True)
    assert kept.keys() - official.keys() == {"null_noise_embedding"}
    with_own = {**kept, "null_noise_embedding": np.arange(32, dtype=np.float32)}
    again, params_again = convert(with_own, "sit")
    assert again.has_null_noise and again.null_noise_init == ""
    np.testing.assert_array_equal(params_again["null_noise_embedding"], np.arange(32))
    with pytest.raises(UserError, match="leave out --init"):
        tables.recognise(with_own, "sit", source="w.pt", num_heads=4, init="zeros")


@pytest.mark.parametrize("init", [None, *loading.NULL_NOISE_INITS])
def test_a_new_null_noise_embedding_starts_as_asked(official, init):
    description = tables.recognise(official, "sit", source="w.pt", num_heads=4, init=init)
    params = tables.import_params(official, description, source="w.pt")
    assert description.null_noise_init == (init or "mean") and not description.has_null_noise
    expected = loading.initial_null_noise(description, params, init or "mean")
    np.testing.assert_array_equal(params["null_noise_embedding"], expected)


def test_four_channels_are_latents_and_three_are_images(official):
    latents, _ = convert(official)
    assert latents.latent == LatentSpace(scaling_factor=0.18215, downsampling=8, encoder_hash="")
    images = official | {
        "x_embedder.proj.weight": official["x_embedder.proj.weight"][:, :3],
        "final_layer.linear.weight": official["final_layer.linear.weight"][: 2 * 3 * 4],
        "final_layer.linear.bias": official["final_layer.linear.bias"][: 2 * 3 * 4],
    }
    assert convert(images)[0].latent is None


@pytest.mark.parametrize(
    ("size", "depth", "width"), [("S", 12, 384), ("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152)]
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_published_sizes_are_recognised_from_shapes(size, depth, width, patch):
    def empty(*shape):
        return np.broadcast_to(np.float32(0), shape)

    tensors = {
        "x_embedder.proj.weight": empty(width, 4, patch, patch),
        "pos_embed": empty(1, (32 // patch) ** 2, width),
        "y_embedder.embedding_table.weight": empty(1001, width),
        "final_layer.linear.weight": empty(patch**2 * 8, width),
        f"blocks.{depth - 1}.attn.qkv.bias": empty(3 * width),
    }
    description = tables.recognise(tensors, "sit", source="w.pt")
    model = description.model
    assert (model.size, model.patch_size, model.learn_sigma) == (size, patch, True)
    assert description.sample_shape == (32, 32, 4) and description.num_classes == 1000
    shapes = tables.official_shapes(description)
    assert all(shapes[name] == array.shape for name, array in tensors.items())


def test_positions_are_bitwise_those_of_the_published_formula():
    width, grid = 1152, 16
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    row, column = np.divmod(np.arange(grid**2), grid)
    angles = [np.einsum("m,d->md", p.astype(np.float32), omega) for p in (column, row)]
    expected = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(sincos_positions(grid, grid, width), expected)


# What is refused


def renamed(tensors, old, new):
    return {new if name == old else name: array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: renamed(t, "blocks.1.attn.qkv.bias", "blocks.1.attn.qvk.bias"), r"qkv.bias is missing.*qvk.bias"),
        (lambda t: renamed(t, "x_embedder.proj.weight", "x_embed.proj.weight"), "nearest name there is x_embed.proj"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("blocks.0.")}, r"blocks.0.\S+ is missing"),
        (lambda t: t | {"blocks.0.norm.weight": t["pos_embed"]}, r"blocks.0.norm.weight is no tensor.*\(1 unexp"),
        (lambda t: t | {"blocks.0.mlp.fc1.bias": np.zeros(64, np.float32)}, r"fc1.bias has shape \(64,\).*\(128,\)"),
        (lambda t: t | {"final_layer.linear.bias": np.zeros(32, np.float16)}, "linear.bias is float16.*float32"),
        (lambda t: t | {"pos_embed": t["pos_embed"] + 0.01}, "pos_embed differs by 0.01.*trained positions"),
        (lambda t: t | {"pos_embed": t["pos_embed"] * np.nan}, "pos_embed differs by nan"),
        (lambda t: t | {"pos_embed": t["pos_embed"][:, :15]}, "no square of tokens"),
        (lambda t: t | {"pos_embed": t["pos_embed"][0]}, "3 axes"),
        (lambda t: t | {"final_layer.linear.weight": np.zeros((48, 32), np.float32)}, "3 times the input's channels"),
        (lambda t: {"weight": t["pos_embed"]}, "state dict of another network?"),
    ],
)
def test_a_wrong_state_dict_is_named(official, change, words):
    with pytest.raises(UserError, match=words):
        convert(change(official))


def test_heads_of_an_unpublished_size_must_be_given(official):
    with pytest.raises(UserError, match="2 blocks of width 32.*num_heads"):
        tables.recognise(official, "dit", source="w.pt")
    with pytest.raises(UserError, match="multiple"):
        description = tables.recognise(official, "dit", source="w.pt", num_heads=5)
        tables.import_params(official, description, source="w.pt")


def test_a_network_of_another_convention_is_not_exported(official):
    description, params = convert(official, "sit")
    with pytest.raises(UserError, match="cannot be written as a dit.*1 - t.*noise"):
        tables.export_params(params, description, "dit", source="folder")
