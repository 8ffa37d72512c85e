"""Judging images without a network: the numbers are those of the metrics, and a killed evaluation goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from nag_jax.config import Config
from nag_jax.data.images import to_float
from nag_jax.errors import UserError
from nag_jax.jobs import evaluate_samples, image_features
from nag_jax.metrics.features import from_function
from nag_jax.metrics.frechet import frechet_distance_from_features, moments
from nag_jax.metrics.reference import write_reference

CONFIG = Config(eval=dataclasses.replace(Config().eval, feature_net="ours"))


def vectors(images) -> jnp.ndarray:
    """Means of the four quarters of an image, for each colour: [B, 12]."""
    quarters = images.reshape(len(images), 2, 4, 2, 4, 3)
    return quarters.mean(axis=(2, 4)).reshape(len(images), -1)


@pytest.fixture(autouse=True)
def feature_net(monkeypatch: pytest.MonkeyPatch):
    net = from_function("quarters", vectors, 12, fingerprint="1")
    monkeypatch.setattr(evaluate_samples, "load_feature_net", lambda folder: net)
    monkeypatch.setattr(image_features, "MAX_BLOCK_ROWS", 16)


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, np.ndarray]:
    """samples.npz and reference.npz, of different brightness."""
    rng = np.random.default_rng(0)
    sets = {
        "samples": rng.integers(0, 200, (70, 8, 8, 3), dtype=np.uint8),
        "reference": rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
    }
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", images)
    return sets


def evaluate(folder: Path, reference: str = "reference.npz", workdir: str = "w", config: Config = CONFIG) -> Path:
    found = evaluate_samples.run(config, folder / "samples.npz", folder / reference, epath.Path(folder / workdir))
    return Path(found)


def metrics_of(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["conditions"] == json.loads((folder / "conditions.json").read_text())
    for key in ("seconds", "environment", "conditions"):
        metrics.pop(key)
    return metrics


def test_the_numbers_are_those_of_the_features(sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    folder = evaluate(tmp_path)
    conditions = json.loads((folder / "conditions.json").read_text())
    assert conditions["compiler_flags"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    written = (folder / "metrics.json").stat().st_mtime_ns
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    assert evaluate(tmp_path) == folder and (folder / "metrics.json").stat().st_mtime_ns == written, "read back"
    metrics = metrics_of(folder)
    sampled, real = (np.asarray(vectors(to_float(images))) for images in (sets["samples"], sets["reference"]))
    distance = metrics["frechet_distance"]
    assert distance["value"] == pytest.approx(frechet_distance_from_features(sampled, real), rel=1e-4)
    assert distance["label"] == "Fréchet distance on quarters features"  # never FID
    sizes = distance["curve"]["sizes"]
    assert sizes[-1] == 70 and sizes[0] >= 24, "subsets of fewer than twice the dimensions lie on no line"
    assert "inception_score" not in metrics
    assert (metrics["num_samples"], metrics["num_reference"]) == (70, 60)
    assert metrics["kernel_distance"]["subset_size"] == 60
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "blocks").exists(), "features are dropped once the metrics are written"


def test_the_same_images_are_alike(sets, tmp_path: Path):
    metrics = metrics_of(evaluate(tmp_path, reference="samples.npz"))
    assert metrics["frechet_distance"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["precision"] == metrics["recall"] == metrics["coverage"] == 1.0


def test_stored_statistics_give_the_distance_of_their_images(sets, tmp_path: Path):
    write_reference(tmp_path / "statistics.npz", moments(np.asarray(vectors(to_float(sets["reference"])))))
    from_images = metrics_of(evaluate(tmp_path))
    from_statistics = metrics_of(evaluate(tmp_path, reference="statistics.npz"))
    assert from_statistics["frechet_distance"]["value"] == pytest.approx(
        from_images["frechet_distance"]["value"], rel=1e-4
    )
    assert "precision" not in from_statistics
    assert (from_statistics["num_reference"], from_statistics["num_reference_images"]) == (60, None)


def test_statistics_count_for_the_distance_and_images_for_the_rest(sets, tmp_path: Path):
    """A reference file such as ADM's: statistics of all images, and some of them."""
    real = np.asarray(vectors(to_float(sets["reference"])))
    write_reference(tmp_path / "statistics.npz", moments(real))
    with np.load(tmp_path / "statistics.npz") as stored:
        np.savez(tmp_path / "both.npz", **stored, arr_0=sets["reference"][:20])
    metrics, whole = metrics_of(evaluate(tmp_path, reference="both.npz")), metrics_of(evaluate(tmp_path))
    assert (metrics["num_reference"], metrics["num_reference_images"]) == (60, 20)
    assert metrics["frechet_distance"]["value"] == pytest.approx(whole["frechet_distance"]["value"], rel=1e-4)
    assert metrics["coverage"] != whole["coverage"]


def test_few_samples_give_no_curve(sets, tmp_path: Path):
    np.savez(tmp_path / "samples.npz", sets["samples"][:59])
    folder = evaluate(tmp_path)
    assert "curve" not in metrics_of(folder)["frechet_distance"] and not (folder / "curve.png").exists()


def test_a_killed_evaluation_goes_on_from_its_blocks(sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = metrics_of(evaluate(tmp_path, workdir="whole"))
    seen: list[int] = []
    compute = image_features.features_of

    def killed_at_the_third(net, images, batch_size):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return compute(net, images, batch_size)

    monkeypatch.setattr(image_features, "features_of", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path)

    def counted(net, images, batch_size):
        seen.append(len(images))
        return compute(net, images, batch_size)

    monkeypatch.setattr(image_features, "features_of", counted)
    folder = evaluate(tmp_path)
    assert seen == [16, 16, 16, 16, 6, 16, 16, 16, 12], "no block twice: 70 samples, 60 of the reference"
    assert metrics_of(folder) == whole
    assert evaluate(tmp_path) == folder and len(seen) == 9, "a finished evaluation is kept"


def test_other_conditions_under_the_same_name_are_refused(sets, tmp_path: Path):
    named = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, name="mine"))
    evaluate(tmp_path, config=named)
    with pytest.raises(UserError, match="under other conditions: reference differ"):
        evaluate(tmp_path, reference="samples.npz", config=named)


def test_statistics_of_another_feature_net_and_a_missing_one_are_refused(sets, tmp_path: Path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="mu in .* has 2048 dimensions, quarters has 12"):
        evaluate(tmp_path, reference="other.npz")
    with pytest.raises(UserError, match="needs a feature net"):
        evaluate(tmp_path, config=Config())
    assert not (tmp_path / "w").exists()


def test_a_function_of_yours_takes_the_place_of_a_folder(sets, tmp_path: Path):
    brightness = from_function("brightness", lambda images: images.mean(axis=(1, 2)), 3, fingerprint="b")
    folder = evaluate_samples.run(
        Config(), tmp_path / "samples.npz", tmp_path / "reference.npz", epath.Path(tmp_path / "w"), brightness
    )
    sampled, real = (to_float(images).mean(axis=(1, 2)) for images in (sets["samples"], sets["reference"]))
    found = json.loads((folder / "metrics.json").read_text())["frechet_distance"]
    assert found["value"] == pytest.approx(frechet_distance_from_features(sampled, real), rel=1e-4)
    assert found["label"] == "Fréchet distance on brightness features"
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
