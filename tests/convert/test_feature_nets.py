"""The tables of the feature nets: complete, one to one, strict, and one network however it was stored."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from nag_jax.convert import feature_nets, torch_file
from nag_jax.convert.__main__ import main
from nag_jax.convert.feature_nets import export_params, graph_table, import_feature_net, import_params, torch_table
from nag_jax.errors import UserError
from nag_jax.feature_nets import NETWORKS, load_feature_net
from nag_jax.metrics.features import FID_NETWORK
from nag_jax.models import efficientnet


@pytest.fixture(scope="module")
def graphs() -> ModuleType:
    """test_graph_def.py, which writes graphs."""
    spec = importlib.util.spec_from_file_location("graphs", Path(__file__).with_name("test_graph_def.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_state(network: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(entry.shape, np.float32) for name, entry in torch_table(network).items()}


@pytest.mark.parametrize("table", [*(lambda n=n: torch_table(n) for n in NETWORKS), graph_table])
def test_a_table_is_one_to_one_and_complete(table):
    entries = table()
    network = efficientnet.NAME if "_fc.bias" in entries else FID_NETWORK
    shapes = {path: leaf.shape for path, leaf in flatten_dict(NETWORKS[network].param_shapes()).items()}
    assert len(entries) == len(shapes)
    ours = {entry.path: tuple(entry.shape[axis] for axis in entry.axes) for entry in entries.values()}
    assert ours == shapes


def test_names_are_those_of_the_published_files():
    inception, graph = torch_table(FID_NETWORK), graph_table()
    assert inception["Mixed_6d.branch1x1.bn.running_var"].path == ("Mixed_6d", "branch1x1", "bn", "var")
    assert inception["fc.weight"].shape == (1008, 2048)
    assert graph["mixed_6/conv/batchnorm/moving_variance"].path == ("Mixed_6d", "branch1x1", "bn", "var")
    assert graph["conv_2/conv2d_params"].path == ("Conv2d_2b_3x3", "conv", "kernel")
    assert graph["mixed/tower/conv_1/conv2d_params"].path == ("Mixed_5b", "branch5x5_2", "conv", "kernel")
    assert graph["mixed_10/tower_1/mixed/conv_1/batchnorm/gamma"].path == ("Mixed_7c", "branch3x3dbl_3b", "bn", "scale")
    assert graph["softmax/weights"].shape == (2048, 1008)
    lite = torch_table(efficientnet.NAME)
    assert lite["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)
    assert lite["_blocks.0._depthwise_conv.weight"].path == ("blocks_0", "depthwise", "conv", "kernel")
    assert lite["_bn1.running_mean"].path == ("head", "bn", "mean")


def test_tensors_are_moved_and_never_changed():
    table, state = torch_table(efficientnet.NAME), random_state(efficientnet.NAME)
    params = import_params(state, table, source="random")
    kernel = params["blocks_3"]["depthwise"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, 0, 7], state["_blocks.3._depthwise_conv.weight"][7, 0])
    back = export_params(params, table)
    assert back.keys() == state.keys()
    assert all(back[name].tobytes() == state[name].tobytes() for name in state)


def test_graph_and_state_dict_of_inception_become_the_same_network(tmp_path: Path, graphs):
    state = random_state(FID_NETWORK)
    torch_file.write_state_dict(tmp_path / "w.pth", state)
    by_path = flatten_dict(import_params(state, torch_table(FID_NETWORK), source="random"))
    nodes = [graphs.array_constant(name, by_path[entry.path]) for name, entry in graph_table().items()]
    others = [
        graphs.array_constant("Sub/y", np.float32(128)),
        graphs.array_constant("Mul/y", np.float32(1 / 128)),
        graphs.other_node("mixed_6/conv", "Relu", "mixed_6/conv/batchnorm"),
    ]
    graphs.write(tmp_path / "classify_image_graph_def.pb", *others, *nodes)

    from_state = import_feature_net(tmp_path / "w.pth", tmp_path / "a")
    from_graph = import_feature_net(tmp_path / "classify_image_graph_def.pb", tmp_path / "b")
    assert from_state.network == from_graph.network == FID_NETWORK
    assert from_state.fingerprint == from_graph.fingerprint
    assert from_state.source_hash == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert (from_graph.source, from_state.source) == ("classify_image_graph_def.pb", "w.pth")
    net = load_feature_net(tmp_path / "b")
    assert net.fingerprint == from_graph.fingerprint and net.distance_label == "FID"
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(net.params), by_path)


def test_wrong_constants_of_a_graph_are_named(tmp_path: Path, graphs):
    first, second, *_ = graph_table().items()
    graphs.write(tmp_path / "g.pb", graphs.array_constant(first[0], np.zeros(first[1].shape)))
    with pytest.raises(UserError, match=f"{second[0]} is missing"):
        import_feature_net(tmp_path / "g.pb", tmp_path / "c")
    assert not (tmp_path / "c").exists()

    one, extra = {first[0]: first[1]}, np.zeros(3, np.float32)
    both = {first[0]: np.zeros(first[1].shape, np.float32), "mixed_11/conv/conv2d_params": extra}
    with pytest.raises(UserError, match="mixed_11/conv/conv2d_params is no tensor of this network"):
        import_params(both, one, source="g.pb")


def test_layers_of_a_graph_are_told_from_its_other_constants():
    layers = [*graph_table(), "mixed_11/conv/conv2d_params", "conv_9/batchnorm/gamma"]
    assert all(feature_nets.GRAPH_PARAMETER.fullmatch(name) for name in layers)
    others = ("Sub/y", "Mul/y", "DecodeJpeg/contents", "ResizeBilinear/size", "softmax/reshape/shape")
    assert not any(feature_nets.GRAPH_PARAMETER.fullmatch(name) for name in others)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("_blocks.7._bn1.running_mean"), r"_blocks\.7\._bn1\.running_mean is missing"),
        (lambda state: state.update({"_se.weight": np.zeros(3, np.float32)}), r"_se\.weight is no tensor"),
        (lambda state: state.update({"_fc.bias": np.zeros(10, np.float32)}), r"_fc\.bias has shape \(10,\)"),
        (lambda state: state.pop("_conv_stem.weight"), "no feature net.*inception-2015-12-05, efficientnet-lite0"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change, words):
    state = random_state(efficientnet.NAME)
    change(state)
    torch_file.write_state_dict(tmp_path / "w.pth", state)
    with pytest.raises(UserError, match=words):
        import_feature_net(tmp_path / "w.pth", tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_rounded_weights_are_refused():
    state = random_state(efficientnet.NAME)
    state["_bn0.bias"] = state["_bn0.bias"].astype(np.float16)
    with pytest.raises(UserError, match=r"_bn0\.bias is float16"):
        import_params(state, torch_table(efficientnet.NAME), source="w.pth")


def test_torchvisions_inception_is_refused():
    tensors = {"Conv2d_1a_3x3.conv.weight": np.zeros(1), "fc.bias": np.zeros(1000)}
    with pytest.raises(UserError, match="torchvision's Inception of 1000 classes.*no FID"):
        feature_nets.recognise_network(tensors, source="inception_v3.pth")


@pytest.mark.parametrize(
    ("name", "is_unused"),
    [
        ("Mixed_6d.branch1x1.bn.num_batches_tracked", True),
        ("_blocks.0._bn1.num_batches_tracked", True),
        ("AuxLogits.conv1.bn.running_mean", True),
        ("AuxLogits.fc.weight", True),
        ("AuxLogits.conv2.conv.weight", False),
        ("AuxLogits.conv0.conv.weight.more", False),
        ("Mixed_6d.branch1x1.bn.weight", False),
    ],
)
def test_what_is_left_out_is_known_by_name(name, is_unused):
    assert bool(feature_nets.UNUSED.fullmatch(name)) == is_unused


def test_counts_of_batches_and_the_second_head_change_nothing(tmp_path: Path):
    state = random_state(efficientnet.NAME)
    torch_file.write_state_dict(tmp_path / "a.pth", state)
    torch_file.write_state_dict(tmp_path / "b.pth", state | {"_bn0.num_batches_tracked": np.float32(3)})
    plain, counted = (import_feature_net(tmp_path / f"{name}.pth", tmp_path / name) for name in "ab")
    assert plain.fingerprint == counted.fingerprint and plain.source_hash != counted.source_hash


@pytest.mark.parametrize("network", NETWORKS)
def test_the_command_knows_a_feature_net_by_its_names(network: str, tmp_path: Path, capsys):
    torch_file.write_state_dict(tmp_path / "weights.pth", random_state(network))
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "net")]) == 0
    assert f"feature net {network}" in capsys.readouterr().out
    assert load_feature_net(tmp_path / "net").name == network
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "other"), "--num_heads=2"]) == 2
    assert "--num_heads is for other weights" in capsys.readouterr().err
