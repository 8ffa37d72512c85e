"""Gives the tests small weights of random numbers, official and diffusers'."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from nag_jax.autoencoder import made_up_autoencoder
from nag_jax.models.layers import sincos_positions
from nag_jax.models.vae_table import to_torch_state_dict

SIZE, CHANNELS, PATCH, HIDDEN, DEPTH, HEADS, CLASSES = 8, 4, 2, 32, 2, 4, 5


@pytest.fixture
def official() -> dict[str, np.ndarray]:
    """A tiny official state dict with learned variance: names and shapes as published, numbers random everywhere."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (HIDDEN, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (HIDDEN,),
        "t_embedder.mlp.0.weight": (HIDDEN, 256),
        "t_embedder.mlp.0.bias": (HIDDEN,),
        "t_embedder.mlp.2.weight": (HIDDEN, HIDDEN),
        "t_embedder.mlp.2.bias": (HIDDEN,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, HIDDEN),
    }
    for i in range(DEPTH):
        for name, (outputs, inputs) in {
            "attn.qkv": (3 * HIDDEN, HIDDEN),
            "attn.proj": (HIDDEN, HIDDEN),
            "mlp.fc1": (4 * HIDDEN, HIDDEN),
            "mlp.fc2": (HIDDEN, 4 * HIDDEN),
            "adaLN_modulation.1": (6 * HIDDEN, HIDDEN),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
    shapes |= {
        "final_layer.linear.weight": (PATCH**2 * 2 * CHANNELS, HIDDEN),
        "final_layer.linear.bias": (PATCH**2 * 2 * CHANNELS,),
        "final_layer.adaLN_modulation.1.weight": (2 * HIDDEN, HIDDEN),
        "final_layer.adaLN_modulation.1.bias": (2 * HIDDEN,),
    }
    rng = np.random.default_rng(0)
    grid = SIZE // PATCH
    tensors = {"pos_embed": sincos_positions(grid, grid, HIDDEN)[None]}
    return tensors | {name: 0.15 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def diffusers_config() -> dict[str, Any]:
    """The content of diffusers' config.json for the network of `official`."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": HIDDEN // HEADS,
        "in_channels": CHANNELS,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": HEADS,
        "num_embeds_ada_norm": CLASSES,
        "num_layers": DEPTH,
        "out_channels": 2 * CHANNELS,
        "patch_size": PATCH,
        "sample_size": SIZE,
    }


@pytest.fixture
def diffusers_tensors(official: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of `official` as diffusers stores them."""
    tensors = {}
    for end in ("weight", "bias"):
        tensors |= {
            f"pos_embed.proj.{end}": official[f"x_embedder.proj.{end}"],
            f"proj_out_1.{end}": official[f"final_layer.adaLN_modulation.1.{end}"],
            f"proj_out_2.{end}": official[f"final_layer.linear.{end}"],
        }
        for i in range(DEPTH):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            tensors |= {
                f"{theirs}.norm1.emb.timestep_embedder.linear_1.{end}": official[f"t_embedder.mlp.0.{end}"],
                f"{theirs}.norm1.emb.timestep_embedder.linear_2.{end}": official[f"t_embedder.mlp.2.{end}"],
                f"{theirs}.norm1.linear.{end}": official[f"{ours}.adaLN_modulation.1.{end}"],
                f"{theirs}.attn1.to_out.0.{end}": official[f"{ours}.attn.proj.{end}"],
                f"{theirs}.ff.net.0.proj.{end}": official[f"{ours}.mlp.fc1.{end}"],
                f"{theirs}.ff.net.2.{end}": official[f"{ours}.mlp.fc2.{end}"],
            }
            parts = np.split(official[f"{ours}.attn.qkv.{end}"], 3)
            tensors |= {f"{theirs}.attn1.to_{name}.{end}": part for name, part in zip("qkv", parts, strict=True)}
    table = official["y_embedder.embedding_table.weight"]
    for i in range(DEPTH):
        tensors[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = table
    return tensors


@pytest.fixture
def diffusers_folder(diffusers_config, diffusers_tensors, tmp_path: Path) -> Path:
    """A folder as diffusers writes it."""
    folder = tmp_path / "DiT-tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(diffusers_config))
    safetensors.numpy.save_file(diffusers_tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    """A folder of a tiny AutoencoderKL with random weights, as diffusers writes it."""
    made_up = made_up_autoencoder()
    config, folder = made_up.description.config, tmp_path / "sd-vae-ft-mse"
    folder.mkdir()
    content = {
        "_class_name": "AutoencoderKL",
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
    }
    (folder / "config.json").write_text(json.dumps(content))
    tensors = to_torch_state_dict(made_up.params, config)
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder
