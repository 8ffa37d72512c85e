"""FID's Inception against torch-fidelity's on the same random weights, at every tap."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.convert.feature_nets import export_params, import_params, torch_table
from nag_jax.data.images import to_float
from nag_jax.metrics.features import FID_NETWORK, tapped_features
from nag_jax.metrics.resize import resize_bilinear_tf1
from nag_jax.models import inception
from nag_jax.params_hash import params_hash

PEERS_NAMES = {"64": "pool1", "192": "pool2", "768": "mixed_6e", "2048": "pool3"}
PEERS_NAMES |= {name: name for name in ("logits_unbiased", "logits")}
TOLERANCE = 1e-4  # of a tap's largest value


@functools.cache
def random_state() -> dict[str, np.ndarray]:
    """Tensors that are random everywhere, of a size that keeps the signal through the depth."""
    rng = np.random.default_rng(0)
    state = {}
    for name, entry in torch_table(FID_NETWORK).items():
        values = rng.standard_normal(entry.shape, np.float32)
        if name.endswith("running_var"):
            state[name] = np.exp(0.3 * values)
        elif len(entry.shape) == 1:
            state[name] = 0.2 * values + np.float32(name.endswith("bn.weight"))
        else:
            state[name] = values * np.float32(np.sqrt(2 / np.prod(entry.shape[1:])))
    # A small variance at the first norm shows its epsilon.
    state["Conv2d_1a_3x3.conv.weight"] *= np.float32(0.05)
    state["Conv2d_1a_3x3.bn.running_var"] *= np.float32(0.002)
    return state


@functools.cache
def params() -> Any:
    return import_params(random_state(), torch_table(FID_NETWORK), source="random")


def images(size: int) -> np.ndarray:
    """Smooth patterns with noise, so that neither edges nor means are all alike."""
    y, x = np.mgrid[:size, :size][..., None] / size
    waves = 90 * np.sin(9 * x + [0, 1, 2]) * np.cos(7 * y)
    noise = np.random.default_rng(size).normal(0, 40, (size, size, 3))
    return np.clip(128 + waves + noise, 0, 255).astype(np.uint8)[None]


@pytest.fixture(scope="module")
def peer(import_peer: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """torch-fidelity's extractor with the random weights; uint8 NHWC images in, all taps by our names out."""
    torch = pytest.importorskip("torch")
    module = import_peer("torch_fidelity.feature_extractor_inceptionv3")
    file: Path = tmp_path_factory.mktemp("peer") / "weights.pth"
    torch.save({name: torch.from_numpy(array) for name, array in random_state().items()}, file)
    network = module.FeatureExtractorInceptionV3("peer", list(PEERS_NAMES), feature_extractor_weights_path=str(file))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: spatial.append(call[-1]))

    def taps(batch: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            values = network(torch.from_numpy(batch.transpose(0, 3, 1, 2)))
        answers = {PEERS_NAMES[name]: value.numpy() for name, value in zip(PEERS_NAMES, values, strict=True)}
        seven = spatial.pop()[:, :7].permute(0, 2, 3, 1)
        return answers | {"spatial": seven.reshape(len(batch), -1).numpy()}

    return taps


def assert_same_taps(actual: Any, expected: dict[str, np.ndarray]) -> None:
    assert expected.keys() == inception.TAPS.keys()
    for name, values in expected.items():
        assert actual[name].shape == (len(values), inception.TAPS[name]), name
        assert np.abs(actual[name] - values).max() <= TOLERANCE * np.abs(values).max(), name
        assert values.std() > 0.01 * np.abs(values).max(), f"{name} is almost constant; the comparison says little"


@pytest.mark.parity
def test_every_tap_is_torch_fidelitys_for_large_and_small_images(peer):
    # One compilation for both sizes: an image that has the network's size already is not resized again.
    inputs = [resize_bilinear_tf1(jnp.asarray(images(size), jnp.float32), 299, 299) for size in (256, 32)]
    actual = jax.jit(inception.Inception().apply)({"params": params()}, jnp.concatenate(inputs))
    expected = [peer(images(size)) for size in (256, 32)]
    assert_same_taps(actual, {name: np.concatenate([each[name] for each in expected]) for name in expected[0]})


@pytest.mark.parity
def test_the_feature_net_takes_samples_of_any_size(peer):
    net = inception.make_feature_net(params())
    batch = np.concatenate([images(32), images(32)[:, ::-1], images(32).swapaxes(1, 2)])
    actual = tapped_features(net, to_float(batch), list(net.taps), batch_size=2)
    assert_same_taps(actual, peer(batch))


def test_its_distance_alone_is_called_fid():
    net = inception.make_feature_net(params())
    assert net.distance_label == "FID"
    assert net.fingerprint == params_hash(params())
    answer = jax.eval_shape(net.apply_taps, net.params, jax.ShapeDtypeStruct((5, 64, 48, 3), jnp.float32))
    assert {name: value.shape for name, value in answer.items()} == {name: (5, n) for name, n in net.taps.items()}
    assert jax.eval_shape(net.apply, net.params, jax.ShapeDtypeStruct((5, 64, 48, 3), jnp.float32)).shape == (5, 2048)
    assert net.dimension == 2048 and net.taps["spatial"] == 2023


def test_matmuls_are_at_the_highest_precision():
    text = str(jax.make_jaxpr(inception.Inception().apply)({"params": params()}, jnp.zeros((1, 32, 32, 3))))
    assert text.count("conv_general_dilated[") == 94 and text.count("dot_general[") == 1
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count("precision=HIGHEST") == 95


def test_export_gives_back_what_was_imported():
    tensors = export_params(params(), torch_table(FID_NETWORK))
    assert tensors.keys() == random_state().keys()
    assert all(np.array_equal(tensors[name], array) for name, array in random_state().items())
