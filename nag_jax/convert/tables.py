"""The official DiT and SiT state dicts and our trees of parameters: names, layouts and sizes, both ways.

Tensors are moved and never changed, so import followed by export is bit-identical. What the numbers mean (the network's
time, the sign of its output) goes into the description. The two kinds share every name and shape; only the file's
settings or its name tell them apart.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import numpy as np

from nag_jax.convert.checks import check_tensors, missing_tensor
from nag_jax.denoiser import LatentSpace, NetworkOutput, NetworkTime, Params
from nag_jax.diffusion.process import ProcessConfig
from nag_jax.errors import UserError
from nag_jax.loading import ModelDescription, initial_null_noise
from nag_jax.models.dit import SIZES, ModelConfig, init_params
from nag_jax.models.layers import sincos_positions

Kind: TypeAlias = Literal["dit", "sit"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POSITIONS, NULL_NOISE = "pos_embed", "null_noise_embedding"
POSITION_TOLERANCE = 1e-5


class Convention(NamedTuple):
    """How an official network is called; see `ModelDescription`."""

    process: str
    network_time: NetworkTime
    output: NetworkOutput


# SiT's time runs from noise to data, so its velocity has the other sign than ours.
CONVENTIONS: dict[Kind, Convention] = {
    "dit": Convention("ddpm", "1000 t - 1", "noise"),
    "sit": Convention("linear", "1 - t", "negative velocity"),
}


class Layout(NamedTuple):
    """How one tensor is laid out in the file and in our tree; `patch_size` matters for patches alone."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray, int], np.ndarray]


def _patches_to_official(kernel: np.ndarray, patch_size: int) -> np.ndarray:
    return kernel.reshape(patch_size, patch_size, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)


SAME = Layout(lambda a: a, lambda a, _: a)
TRANSPOSED = Layout(lambda a: a.T, lambda a, _: a.T)
PATCHES = Layout(lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), _patches_to_official)


def _linear(official: str, ours: str) -> dict[str, tuple[str, Layout]]:
    return {f"{official}.weight": (f"{ours}/kernel", TRANSPOSED), f"{official}.bias": (f"{ours}/bias", SAME)}


# official name: (path in our tree, layout), in the order of the official state dict
BEFORE_BLOCKS: dict[str, tuple[str, Layout]] = {
    "x_embedder.proj.weight": ("x_embedder/kernel", PATCHES),
    "x_embedder.proj.bias": ("x_embedder/bias", SAME),
    **_linear("t_embedder.mlp.0", "t_embedder/mlp_0"),
    **_linear("t_embedder.mlp.2", "t_embedder/mlp_2"),
    "y_embedder.embedding_table.weight": ("y_embedder/embedding", SAME),
}
BLOCK: dict[str, tuple[str, Layout]] = {  # behind "blocks.3." there; one row of the stacked "blocks" here
    **_linear("attn.qkv", "attn/qkv"),
    **_linear("attn.proj", "attn/proj"),
    **_linear("mlp.fc1", "mlp/fc1"),
    **_linear("mlp.fc2", "mlp/fc2"),
    **_linear("adaLN_modulation.1", "adaLN_modulation"),
}
AFTER_BLOCKS: dict[str, tuple[str, Layout]] = {
    **_linear("final_layer.linear", "final_layer/linear"),
    **_linear("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation"),
}


def describe(
    kind: Kind,
    *,
    depth: int,
    hidden_size: int,
    num_heads: int,
    patch_size: int,
    learn_sigma: bool,
    num_classes: int,
    sample_shape: tuple[int, int, int],
    null_noise_init: str,
) -> ModelDescription:
    """The description of a network of an official kind; a published size gets its name.

    With four channels its states are taken for latents of the Stable Diffusion autoencoder, as those of all published
    networks are. An empty `null_noise_init` says that training made the null noise embedding.
    """
    model = ModelConfig(patch_size=patch_size, learn_sigma=learn_sigma)
    size = next((size for size, shape in SIZES.items() if shape == (depth, hidden_size, num_heads)), "")
    process, network_time, output = CONVENTIONS[kind]
    return ModelDescription(
        model=dataclasses.replace(model, size=size)
        if size
        else dataclasses.replace(model, depth=depth, hidden_size=hidden_size, num_heads=num_heads),
        process=ProcessConfig(process),
        num_classes=num_classes,
        sample_shape=sample_shape,
        network_time=network_time,
        output=output,
        has_null_noise=not null_noise_init,
        null_noise_init=null_noise_init,
        latent=LatentSpace() if sample_shape[2] == 4 else None,
    )


def recognise(
    tensors: Mapping[str, np.ndarray],
    kind: Kind,
    *,
    source: str,
    num_heads: int | None = None,
    init: str | None = None,
) -> ModelDescription:
    """What network a state dict belongs to, from its names and shapes.

    Args:
        tensors: arrays by official name.
        kind: see `CONVENTIONS`.
        source: what error messages call the file.
        num_heads: attention heads, which no shape tells; None for a published size.
        init: how the null noise embedding starts where the file holds none, of `NULL_NOISE_INITS`; None for "mean".

    Returns:
        The ModelDescription; with `has_null_noise` if the file holds a null noise embedding.

    Raises:
        UserError: this is no such network, or of no known size, or `init` is given in vain.
    """
    if NULL_NOISE in tensors and init:
        raise UserError(f"{source} holds a {NULL_NOISE}, which is kept: leave out --init.")
    for name, axes in {
        "x_embedder.proj.weight": 4,
        POSITIONS: 3,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.weight": 2,
    }.items():
        if name not in tensors:
            raise UserError(missing_tensor(source, name, tensors))
        if tensors[name].ndim != axes or not tensors[name].size:
            raise UserError(f"{source}: {name} has shape {tensors[name].shape}, but {axes} axes are expected.")
    hidden_size, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    side = math.isqrt(tensors[POSITIONS].shape[1])
    if side**2 != tensors[POSITIONS].shape[1]:
        raise UserError(f"{source}: {POSITIONS} has shape {tensors[POSITIONS].shape}, which is no square of tokens.")
    outputs = tensors["final_layer.linear.weight"].shape[0] / (patch_size**2 * channels)
    if outputs not in (1, 2):
        raise UserError(
            f"{source}: final_layer.linear.weight makes {outputs:g} times the input's channels, not 1 or 2."
        )
    indices = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    depth = max(indices, default=0) + 1
    if num_heads is None:
        num_heads = next((heads for *shape, heads in SIZES.values() if shape == [depth, hidden_size]), None)
    if num_heads is None:
        raise UserError(
            f"{source}: {depth} blocks of width {hidden_size} are none of the sizes {', '.join(SIZES)}, and no tensor "
            "tells the number of attention heads. Give --num_heads."
        )
    return describe(
        kind,
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=patch_size,
        learn_sigma=outputs == 2,
        num_classes=tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        sample_shape=(side * patch_size, side * patch_size, channels),
        null_noise_init="" if NULL_NOISE in tensors else init or "mean",
    )


def import_params(tensors: Mapping[str, np.ndarray], description: ModelDescription, *, source: str) -> Params:
    """An official state dict as our tree of parameters, blocks stacked.

    A file without a null noise embedding gets the one that the description says it starts with.

    Args:
        tensors: float32 arrays by official name.
        description: from `recognise`.
        source: what error messages call the file.

    Returns:
        A nested dict of arrays on the host.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or dtype, or the positions are not sine-cosine.
    """
    _check(tensors, description, source)
    tree: dict[str, Any] = {}
    for name, (path, layout) in (BEFORE_BLOCKS | AFTER_BLOCKS).items():
        _put(tree, path, np.ascontiguousarray(layout.to_ours(tensors[name])))
    for name, (path, layout) in BLOCK.items():
        rows = [layout.to_ours(tensors[f"blocks.{i}.{name}"]) for i in range(description.network().depth)]
        _put(tree, f"blocks/{path}", np.stack(rows))
    tree[NULL_NOISE] = (
        initial_null_noise(description, tree, description.null_noise_init)
        if description.null_noise_init
        else np.asarray(tensors[NULL_NOISE])
    )
    return tree


def export_params(
    params: Params, description: ModelDescription, kind: Kind, *, source: str, keep_null_noise: bool = False
) -> dict[str, np.ndarray]:
    """The inverse of `import_params`, in the order of the official state dict.

    Args:
        params: a tree of arrays, blocks stacked or not.
        description: of the network.
        kind: the official network that it is to be called as.
        source: what error messages call the network.
        keep_null_noise: also write `null_noise_embedding`, which the official code does not know.

    Returns:
        Arrays by official name.

    Raises:
        UserError: the network is called in another way than those of `kind`, or its input is not square.
    """
    convention = Convention(description.process.name, description.network_time, description.output)
    if convention != CONVENTIONS[kind]:
        raise UserError(
            f"{source} cannot be written as a {kind}: its process, time and output are {', '.join(convention)}, those "
            f"of a {kind} {', '.join(CONVENTIONS[kind])}."
        )
    network = description.network()
    height, width, _ = network.input_shape
    if height != width:
        raise UserError(f"{source} cannot be written as a {kind}: its input of {height} x {width} is not square.")

    def official(path: str, layout: Layout, row: int | None = None) -> np.ndarray:
        array = np.asarray(_get(params, path))
        return np.ascontiguousarray(layout.to_official(array if row is None else array[row], network.patch_size))

    def block(i: int, path: str, layout: Layout) -> np.ndarray:
        return official(f"blocks/{path}", layout, i) if "blocks" in params else official(f"blocks_{i}/{path}", layout)

    grid = height // network.patch_size
    tensors = {POSITIONS: sincos_positions(grid, grid, network.hidden_size)[None]}
    tensors |= {name: official(*entry) for name, entry in BEFORE_BLOCKS.items()}
    for i in range(network.depth):
        tensors |= {f"blocks.{i}.{name}": block(i, *entry) for name, entry in BLOCK.items()}
    tensors |= {name: official(*entry) for name, entry in AFTER_BLOCKS.items()}
    return {**tensors, NULL_NOISE: np.asarray(params[NULL_NOISE])} if keep_null_noise else tensors


def official_shapes(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the official state dict of a described network, with no array made."""
    network = description.network()
    stacked = dataclasses.replace(network, scan_blocks=True)
    ours = jax.eval_shape(lambda key: init_params(stacked, key), jax.random.key(0))

    def shape(path: str, layout: Layout, is_block: bool) -> tuple[int, ...]:
        inner = _get(ours, path).shape[1 if is_block else 0 :]
        return layout.to_official(np.broadcast_to(np.float32(0), inner), network.patch_size).shape

    tokens = math.prod(network.input_shape[:2]) // network.patch_size**2
    shapes: dict[str, tuple[int, ...]] = {POSITIONS: (1, tokens, network.hidden_size)}
    shapes |= {name: shape(*entry, False) for name, entry in (BEFORE_BLOCKS | AFTER_BLOCKS).items()}
    rows = {name: shape(f"blocks/{path}", layout, True) for name, (path, layout) in BLOCK.items()}
    return shapes | {f"blocks.{i}.{name}": rows[name] for i in range(network.depth) for name in rows}


def _check(tensors: Mapping[str, np.ndarray], description: ModelDescription, source: str) -> None:
    network = description.network()
    expected = official_shapes(description)
    if description.has_null_noise:
        expected[NULL_NOISE] = (network.hidden_size,)
    check_tensors(tensors, expected, source=source)
    grid = network.input_shape[0] // network.patch_size
    error = np.abs(tensors[POSITIONS][0] - sincos_positions(grid, grid, network.hidden_size)).max()
    if not error <= POSITION_TOLERANCE:
        raise UserError(
            f"{source}: {POSITIONS} differs by {error:.2g} from the fixed sine-cosine positions that a DiT has. A "
            "network with trained positions cannot be converted."
        )


def _put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[leaf] = value


def _get(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
