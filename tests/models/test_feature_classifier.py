"""The feature classifier learns digits, is decided by its seed, and survives its file bit for bit."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from nag_jax.errors import UserError
from nag_jax.metrics.features import features
from nag_jax.metrics.frechet import frechet_distance_from_features
from nag_jax.models import feature_classifier
from nag_jax.models.feature_classifier import (
    FeatureClassifierConfig,
    load_feature_net,
    save_feature_net,
    train_feature_classifier,
)

TINY = FeatureClassifierConfig(num_steps=3, batch_size=4, feature_dimension=6, width=2)


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    images = (pixels.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)[order]
    return images, labels.astype(np.int32)[order]


@pytest.fixture(scope="module")
def trained(digits):
    images, labels = digits
    calls = []
    net, params, accuracy = train_feature_classifier(
        images[:1437],
        labels[:1437],
        10,
        progress=lambda *call: calls.append(call),
        test_images=images[1437:],
        test_labels=labels[1437:],
        name="digits-classifier",
    )
    return net, params, accuracy, calls


def tiny(digits, seed=0, **changes):
    return train_feature_classifier(digits[0][:20], digits[1][:20], 10, TINY, seed, **changes)


def leaves(net):
    return jax.tree.leaves(net.params)


def test_learns_digits(trained):
    net, _, accuracy, calls = trained
    assert accuracy >= 0.97
    assert net.dimension == 64 and net.name == "digits-classifier"
    assert [call[0] for call in calls] == list(range(50, 301, 50)) and all(call[1] == 300 for call in calls)
    assert calls[-1][2] < 0.1


def test_accuracy_is_that_of_its_features_and_head(trained, digits):
    net, params, accuracy, _ = trained
    scores = features(net, digits[0][1437:], 100) @ params["head"]["kernel"] + params["head"]["bias"]
    assert (scores.argmax(-1) == digits[1][1437:]).mean() == accuracy


def test_its_features_tell_damaged_digits_from_real_ones(trained, digits):
    net, images = trained[0], digits[0]
    noise = np.random.default_rng(2).normal(size=images[:600].shape)
    real, held_out = features(net, images[:600]), features(net, images[1197:])
    distances = [
        frechet_distance_from_features(
            features(net, np.clip(images[:600] + level * noise, -1, 1).astype(np.float32)), held_out
        )
        for level in (0.2, 0.5)
    ]
    assert frechet_distance_from_features(real, held_out) < distances[0] < distances[1]


def test_the_seed_and_nothing_else_decides(digits, monkeypatch):
    first, _, accuracy = tiny(digits)
    assert accuracy is None
    monkeypatch.setattr(feature_classifier, "STEPS_PER_CALL", 2)
    again = tiny(digits)[0]
    assert first.fingerprint == again.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(again), strict=True))
    assert tiny(digits, seed=1)[0].fingerprint != first.fingerprint


def test_color_images_of_32_pixels():
    images = np.random.default_rng(3).uniform(-1, 1, (5, 32, 32, 3)).astype(np.float32)
    net = train_feature_classifier(images, np.arange(5), 5, TINY)[0]
    assert features(net, images, 4).shape == (5, 6)


def test_halves_until_the_shorter_side_is_at_most_four_pixels():
    for side in range(1, 70):
        num_halvings = feature_classifier._num_halvings((side + 3, side))
        assert np.ceil(side / 2**num_halvings) <= 4
        assert num_halvings == 0 or np.ceil(side / 2 ** (num_halvings - 1)) > 4


def test_save_and_load_are_bitwise(trained, digits, tmp_path):
    net, path = trained[0], tmp_path / "new" / "net.npz"
    save_feature_net(path, net)
    loaded = load_feature_net(path)
    assert (loaded.name, loaded.dimension, loaded.fingerprint) == (net.name, net.dimension, net.fingerprint)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(net.params)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(leaves(net), leaves(loaded), strict=True))
    images = digits[0][:10]
    assert np.array_equal(features(net, images, 10), features(loaded, images, 10))
    assert [p.name for p in path.parent.iterdir()] == ["net.npz"]
    first_bytes = path.read_bytes()
    save_feature_net(path, loaded)
    assert path.read_bytes() == first_bytes


def test_bad_files_are_named(digits, tmp_path):
    net, path = tiny(digits)[0], tmp_path / "net.npz"
    with pytest.raises(UserError, match="does not exist"):
        load_feature_net(path)
    save_feature_net(path, net)
    whole = path.read_bytes()
    scratched = whole[:600] + b"\xff" * 8 + whole[608:]
    for content in (b"", whole[: len(whole) // 2], scratched, b"not an archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_feature_net(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(UserError, match="no feature net"):
        load_feature_net(path)
    path.write_bytes(whole)
    with np.load(path) as archive:
        stored = dict(archive)
    stored["params/features/bias"] = stored["params/features/bias"] + 1
    np.savez(path, **stored)
    with pytest.raises(UserError, match="does not match its fingerprint"):
        load_feature_net(path)


def test_data_that_does_not_fit_is_refused(digits):
    images, labels = digits[0][:6], digits[1][:6]
    with pytest.raises(UserError, match="expected 6 integers"):
        train_feature_classifier(images, labels[:5], 10, TINY)
    with pytest.raises(UserError, match="expected 0 to 2"):
        train_feature_classifier(images, labels, 3, TINY)
    with pytest.raises(UserError, match="uint8"):
        train_feature_classifier(images.astype(np.uint8), labels, 10, TINY)
    with pytest.raises(UserError, match="together"):
        train_feature_classifier(images, labels, 10, TINY, test_images=images)
    with pytest.raises(UserError, match="at least 1"):
        train_feature_classifier(images, labels, 10, FeatureClassifierConfig(num_steps=0))
