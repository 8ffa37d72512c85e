"""Diffusers' `DiTTransformer2DModel` as an official DiT: a table of names, and what its config.json must say.

The official tensors are all there, only cut and repeated: q, k and v apart, and the embeddings of time and class once
in every block. They are put together here, and `tables.py` does the rest, so that a diffusers folder and the official
file that it was made from become the same network.

That network is the official one, which diffusers' class computes with two changes of its own (as of 0.42): its
sinusoidal time features have the frequencies 10000^(-i / 127), not 10000^(-i / 128), and the layer norm before the MLP
adds `norm_eps` = 1e-5, not 1e-6. The published weights were trained without these changes; for a network that was
trained in diffusers' class, the frequencies are the wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nag_jax.convert import tables
from nag_jax.convert.checks import check_tensors
from nag_jax.errors import UserError
from nag_jax.loading import ModelDescription
from nag_jax.models.layers import sincos_positions

# The class was split from the second one, whose defaults are those of other networks.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
SIZE_KEYS = (
    "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "sample_size", "in_channels",
    "num_embeds_ada_norm",
)  # fmt: skip
# What another value of these keys would change has no counterpart here.
_FIXED = {
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
}
_FIXED_OR_ABSENT = {
    "norm_eps": (1e-5, 1e-6),
    "cross_attention_dim": (None,),
    "num_vector_embeds": (None,),
    "caption_channels": (None,),
    "interpolation_scale": (None, 1),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "attention_type": ("default",),
}

# diffusers' layer: the official one; both have a weight and a bias
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_REPEATED = {  # in every block
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def describe(config: Mapping[str, Any], *, source: str, init: str | None = None) -> ModelDescription:
    """The network that diffusers' config.json describes.

    Args:
        config: its content.
        source: what error messages call it.
        init: how the null noise embedding starts; see `tables.recognise`.

    Raises:
        UserError: another class, a missing key, or an option that the official DiT does not have.
    """
    kind = config.get("_class_name", CLASSES[0])
    if kind not in CLASSES:
        raise UserError(f"{source}: config.json describes a {kind}; of networks only {CLASSES[0]} can be converted.")
    missing = [key for key in SIZE_KEYS if type(config.get(key)) is not int]
    if missing:
        raise UserError(f"{source}: config.json has no whole number for {', '.join(missing)}.")
    absent = {key: values[0] for key, values in _FIXED.items() if kind == CLASSES[0]}
    absent |= {key: values[0] for key, values in _FIXED_OR_ABSENT.items()}
    found = {key: config.get(key, absent.get(key)) for key in _FIXED | _FIXED_OR_ABSENT}
    other = [f"{key}={found[key]!r}" for key, values in (_FIXED | _FIXED_OR_ABSENT).items() if found[key] not in values]
    channels, outputs = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if outputs not in (channels, 2 * channels):
        other.append(f"out_channels={outputs} with in_channels={channels}")
    if config["sample_size"] % config["patch_size"]:
        other.append(f"sample_size={config['sample_size']} with patch_size={config['patch_size']}")
    if other:
        raise UserError(f"{source}: config.json asks for what the official DiT does not have: {', '.join(other)}.")
    return tables.describe(
        "dit",
        depth=config["num_layers"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        patch_size=config["patch_size"],
        learn_sigma=outputs == 2 * channels,
        num_classes=config["num_embeds_ada_norm"],
        sample_shape=(config["sample_size"], config["sample_size"], channels),
        null_noise_init=init or "mean",
    )


def to_official(
    tensors: Mapping[str, np.ndarray], description: ModelDescription, *, source: str
) -> dict[str, np.ndarray]:
    """The official state dict of diffusers' tensors.

    Args:
        tensors: float32 arrays by diffusers' name.
        description: from `describe`.
        source: what error messages call them.

    Returns:
        Arrays by official name, views where no tensor was cut; the positions, which diffusers does not store, included.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or dtype, or differs between blocks that share it.
    """
    network = description.network()
    names = official_names(network.depth)
    shapes = tables.official_shapes(description)

    def shape(name: str) -> tuple[int, ...]:
        first, *rest = shapes[names[name]]
        return (first // len(_QKV) if any(f".{part}." in name for part in _QKV) else first, *rest)

    check_tensors(tensors, {name: shape(name) for name in names}, source=source)
    parts: dict[str, list[str]] = {}
    for name, official in names.items():
        parts.setdefault(official, []).append(name)
    side = network.input_shape[0] // network.patch_size
    state = {tables.POSITIONS: sincos_positions(side, side, network.hidden_size)[None]}
    for official, (first, *others) in parts.items():
        if ".attn.qkv." in official:
            state[official] = np.concatenate([tensors[name] for name in (first, *others)])
            continue
        for name in others:
            if tensors[name].tobytes() != tensors[first].tobytes():
                raise UserError(
                    f"{source}: {name} differs from {first}. An official DiT embeds time and class once for all blocks."
                )
        state[official] = tensors[first]
    return state


def official_names(depth: int) -> dict[str, str]:
    """The official name for each of diffusers'; the parts of one official tensor stand in order."""
    layers = dict(_OUTSIDE)
    tensors = {}
    for i in range(depth):
        before = f"transformer_blocks.{i}."
        layers |= {before + theirs: official for theirs, official in _REPEATED.items()}
        layers |= {before + theirs: f"blocks.{i}.{official}" for theirs, official in _BLOCK.items()}
        layers |= {before + theirs: f"blocks.{i}.attn.qkv" for theirs in _QKV}
        tensors[f"{before}norm1.emb.class_embedder.embedding_table.weight"] = "y_embedder.embedding_table.weight"
    for theirs, official in layers.items():
        tensors |= {f"{theirs}.{end}": f"{official}.{end}" for end in ("weight", "bias")}
    return tensors
