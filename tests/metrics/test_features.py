"""The feature interface: padding leaves no trace, one compilation, honest names, refused images."""

import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.metrics.features import FID_NETWORK, FeatureNet, features, from_function, tapped_features
from nag_jax.params_hash import params_hash


def tiny_net(calls: list[tuple[int, ...]] | None = None) -> FeatureNet:
    params = {"w": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)}

    def apply(params, images):
        if calls is not None:
            calls.append(images.shape)
        # Not odd in the images, so a zero image has features that would show if they leaked.
        return jnp.cos(images.reshape(len(images), -1) @ params["w"])

    return FeatureNet("tiny", apply, params, 5, params_hash(params))


def some_images(n: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (n, 2, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 64])
def test_batch_size_and_padding_do_not_matter(batch_size):
    net, images = tiny_net(), some_images(10)
    result = features(net, images, batch_size)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, np.cos(images.reshape(10, -1) @ net.params["w"]), atol=1e-6)


def test_compiles_once_for_all_batches_and_calls():
    calls: list[tuple[int, ...]] = []
    net = tiny_net(calls)
    features(net, some_images(10), 4)
    features(net, some_images(3), 4)
    assert calls == [(4, 2, 2, 3)]


def test_no_images_give_no_features():
    assert features(tiny_net(), some_images(0), 4).shape == (0, 5)


def test_the_label_names_the_features_and_is_not_fid():
    assert tiny_net().distance_label == "Fréchet distance on tiny features"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 2, 2, 3), np.int32), "int32; expected uint8, or float32"),
        (np.zeros((2, 2, 3), np.float32), r"\[2, 2, 3\]"),
        (np.full((2, 2, 2, 3), 1.2, np.float32), "clip"),
        (np.full((2, 2, 2, 3), np.nan, np.float32), "NaN"),
    ],
)
def test_refuses_images_it_would_misread(images, message):
    with pytest.raises(UserError, match=message):
        features(tiny_net(), images, 4)


def test_fingerprint_depends_on_content_alone():
    a, b = np.arange(6, dtype=np.float32), np.ones(2, np.float32)
    base = params_hash({"x": {"a": a}, "b": b})
    assert base == params_hash({"b": jnp.asarray(b), "x": {"a": jnp.asarray(a)}})
    for other in (
        {"x": {"a": a.reshape(2, 3)}, "b": b},
        {"x": {"a": a.view(np.int32)}, "b": b},
        {"y": {"a": a}, "b": b},
        {"x": {"a": np.nextafter(a, 9)}, "b": b},
    ):
        assert params_hash(other) != base


def tapped_net() -> FeatureNet:
    def apply_taps(params, images):
        flat = images.reshape(len(images), -1)
        return {"one": jnp.cos(flat @ params["w"]), "two": flat[:, :2], "three": flat[:, :3]}

    net = tiny_net()
    taps = {"one": 5, "two": 2, "three": 3}
    return FeatureNet("tapped", net.apply, net.params, 5, net.fingerprint, taps, apply_taps)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_taps_come_from_one_pass_and_equal_the_features(batch_size):
    net, images = tapped_net(), some_images(10)
    taps = tapped_features(net, images, ["one", "three"], batch_size)
    assert list(taps) == ["one", "three"]
    np.testing.assert_allclose(taps["one"], features(net, images, batch_size), atol=1e-6)
    np.testing.assert_array_equal(taps["three"], images.reshape(10, -1)[:, :3])
    assert tapped_features(net, images[:0], ["two"])["two"].shape == (0, 2)


def test_unknown_taps_are_named():
    with pytest.raises(UserError, match="tapped has no tap four. It has: one, two, three"):
        tapped_features(tapped_net(), some_images(1), ["one", "four"])
    with pytest.raises(UserError, match="tiny has no tap one. It has: none"):
        tapped_features(tiny_net(), some_images(1), ["one"])


def test_a_users_own_function_is_a_feature_net_but_never_fid():
    net = from_function("means", lambda images: images.mean(axis=(1, 2)), 3, fingerprint="1.0")
    images = some_images(5)
    np.testing.assert_allclose(features(net, images, 2), images.mean(axis=(1, 2)), atol=1e-6)
    assert net.distance_label == "Fréchet distance on means features" and net.fingerprint == "1.0"
    with pytest.raises(UserError, match="FID's network"):
        from_function(FID_NETWORK, lambda images: images, 3, fingerprint="1.0")


def test_another_dimension_than_promised_is_named():
    net = from_function("means", lambda images: images.mean(axis=(1, 2)), 4, fingerprint="1.0")
    with pytest.raises(UserError, match=r"means answers \[3\] numbers for an image; its dimension is 4"):
        features(net, some_images(2), 2)
