"""Tensors of diffusers' `AutoencoderKL` to the parameters of `vae.Vae` and back; layout only, no file is read here.

Every tensor is a transposition of one of ours, so that import and export give back the same bits.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from nag_jax.errors import UserError
from nag_jax.models.vae import VaeConfig, param_shapes

SHOWN = 5  # names in one message
AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # by rank: OIHW to HWIO, OI to IO, a vector as it is

# Files written before diffusers 0.18 name the attention's layers so.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(\.attentions\.\d+\.)(" + "|".join(OLD_ATTENTION_NAMES) + r")(?=\.)")

# What another value of these keys in diffusers' config.json would change has no counterpart here.
_FIXED = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


@dataclasses.dataclass(frozen=True)
class TableEntry:
    """Where a tensor goes: `ours = tensor.transpose(axes)`.

    Attributes:
        path: keys from the root of our parameter tree.
        axes: the axis of the tensor that each of our axes is.
        shape: of the tensor, in PyTorch's layout.
    """

    path: tuple[str, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def vae_table(config: VaeConfig) -> dict[str, TableEntry]:
    """The complete table from the names of today's diffusers to our parameters, both one to one."""
    table = {}
    for path, leaf in traverse_util.flatten_dict(param_shapes(config)).items():
        axes = AXES[len(leaf.shape)]
        shape = tuple(leaf.shape[i] for i in np.argsort(axes))
        table[_torch_name(path)] = TableEntry(path, axes, shape)
    return table


def from_torch_state_dict(state: Mapping[str, np.ndarray], config: VaeConfig) -> dict[str, Any]:
    """Parameters of `Vae(config)` from the tensors of diffusers' `AutoencoderKL`.

    Args:
        state: tensor by name, float32; the attention's layers may have their old or their new names.
        config: size, for example from `config_from_state_dict` or `config_from_diffusers`.

    Returns:
        The parameter tree, float32 numpy arrays that may be views of `state`.

    Raises:
        UserError: tensors that are missing, unexpected, named twice, of another shape or not float32.
    """
    table, state = vae_table(config), _with_new_names(state)
    _refuse("lack", sorted(table.keys() - state.keys()))
    _refuse("hold the unexpected", sorted(state.keys() - table.keys()))
    _refuse(
        "have another shape at",
        [
            f"{name} {list(state[name].shape)}, expected {list(entry.shape)}"
            for name, entry in table.items()
            if state[name].shape != entry.shape
        ],
    )
    rounded = [f"{name} ({state[name].dtype})" for name in table if state[name].dtype != np.float32]
    if rounded:
        raise UserError(
            f"VAE: {len(rounded)} tensors are not float32, such as {rounded[0]}. Give the weights as they were "
            "trained; rounded ones are another network."
        )
    return traverse_util.unflatten_dict(
        {entry.path: state[name].transpose(entry.axes) for name, entry in table.items()}
    )


def to_torch_state_dict(params: Mapping[str, Any], config: VaeConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_torch_state_dict`, with the names of today's diffusers and contiguous tensors.

    Raises:
        UserError: parameters that are not those of `Vae(config)`.
    """
    table, flat = vae_table(config), traverse_util.flatten_dict(dict(params))
    paths = {entry.path for entry in table.values()}
    _refuse("lack", sorted("/".join(path) for path in paths - flat.keys()))
    _refuse("hold the unexpected", sorted("/".join(path) for path in flat.keys() - paths))
    wrong = [
        f"{'/'.join(entry.path)} {list(np.shape(flat[entry.path]))}"
        for entry in table.values()
        if np.shape(flat[entry.path]) != tuple(entry.shape[i] for i in entry.axes)
    ]
    _refuse("have another shape at", wrong)
    return {
        name: np.ascontiguousarray(np.asarray(flat[entry.path]).transpose(np.argsort(entry.axes)))
        for name, entry in table.items()
    }


def config_from_state_dict(
    state: Mapping[str, np.ndarray], norm_groups: int = 32, scaling_factor: float = 0.18215
) -> VaeConfig:
    """The size of an autoencoder, read from names and shapes.

    Args:
        state: tensor by name, as for `from_torch_state_dict`.
        norm_groups, scaling_factor: shapes do not tell them.

    Raises:
        UserError: the tensors are not an `AutoencoderKL`'s.
    """
    try:
        depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down_blocks."))
        widths = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(depth)]
        first_block = re.compile(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight")
        layers = sum(first_block.fullmatch(name) is not None for name in state)
        channels = state["encoder.conv_in.weight"].shape[1]
        latent_channels = state["decoder.conv_in.weight"].shape[1]
    except (KeyError, ValueError, IndexError):
        raise UserError("VAE: the tensors are not those of diffusers' AutoencoderKL; give its file.") from None
    return VaeConfig(channels, latent_channels, tuple(widths), layers, norm_groups, scaling_factor)


def config_from_diffusers(content: Mapping[str, Any]) -> VaeConfig:
    """The size of an autoencoder, read from the content of diffusers' config.json.

    Raises:
        UserError: another class, a missing key or an option that this network does not have.
    """
    kind = content.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(f"VAE: config.json describes a {kind}; only AutoencoderKL can be converted.")
    keys = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"VAE: config.json lacks {', '.join(missing)}.")
    other = [f"{key}={content[key]!r}" for key, value in _FIXED.items() if content.get(key, value) != value]
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        other += [f"{key} with {name}" for name in sorted(set(content.get(key, ())) - {block})]
    if content["in_channels"] != content["out_channels"]:
        other.append(f"in_channels={content['in_channels']} with out_channels={content['out_channels']}")
    if other:
        raise UserError(f"VAE: config.json asks for what the SD-VAE does not have: {', '.join(other)}.")
    return VaeConfig(
        channels=content["in_channels"],
        latent_channels=content["latent_channels"],
        block_out_channels=tuple(content["block_out_channels"]),
        layers_per_block=content["layers_per_block"],
        norm_groups=content.get("norm_num_groups", VaeConfig.norm_groups),
        scaling_factor=content.get("scaling_factor", VaeConfig.scaling_factor),
    )


def _torch_name(path: tuple[str, ...]) -> str:
    """("mid_block", "resnets_0", "norm1", "scale") to "mid_block.resnets.0.norm1.weight"."""
    modules = [re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]]
    return ".".join([*modules, "bias" if path[-1] == "bias" else "weight"])


def _with_new_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        new = _OLD_NAME.sub(lambda match: match[1] + OLD_ATTENTION_NAMES[match[2]], name)
        _refuse("hold twice, by an old and a new name,", [new] if new in renamed else [])
        renamed[new] = tensor
    return renamed


def _refuse(what: str, names: list[str]) -> None:
    if names:
        rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(f"VAE: the tensors {what} {', '.join(names[:SHOWN])}{rest}; are they this network's?")
