"""The seven fine-tuning sets: the table against TFDS, and each set read from made-up and hand-made data."""

import importlib.resources.abc
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from nag_jax.data import prepare
from nag_jax.data.catalogue import find_builder
from nag_jax.data.fine_tuning_sets import FINE_TUNING_SETS, FineTuningSet
from nag_jax.data.sources import DataConfig, open_source

BY_KEY = pytest.mark.parametrize("known", FINE_TUNING_SETS.values(), ids=FINE_TUNING_SETS.keys())
OF_TFDS = [known.name for known in FINE_TUNING_SETS.values() if known.name not in ("df20m", "artbench10")]


def test_the_seven_of_the_published_tables():
    assert list(FINE_TUNING_SETS) == ["food101", "sun397", "caltech101", "cub", "cars", "df20m", "artbench"]


@BY_KEY
def test_number_of_classes_is_that_of_the_builder(known: FineTuningSet, tmp_path: Path):
    assert find_builder(known.name, tmp_path).info.features["label"].num_classes == known.num_classes


@BY_KEY
def test_made_up_images_have_the_classes(known: FineTuningSet):
    config = DataConfig(name=known.name, mock_examples=3, image_size=8, channels=3)
    source = open_source(config, known.split)
    assert len(source) == 3 and source.num_classes == known.num_classes
    assert all(0 <= source[i]["label"] < known.num_classes for i in range(3))


def encode(pixels: np.ndarray, file_format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


def hand_made_examples(features: Any, num_images: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Image i is flat of grey i and has label i; every other feature is filled with something valid."""
    fill = {
        tfds.features.Text: "x",
        tfds.features.BBoxFeature: tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        tfds.features.Image: b"a mask that no decoder would take",
    }
    for number in range(num_images):
        example = {key: fill[type(feature)] for key, feature in features.items() if key not in ("image", "label")}
        yield f"{number}", {**example, "image": encode(np.full((9, 7, 3), number, np.uint8)), "label": number}


@pytest.mark.parametrize("name", [*OF_TFDS, "imagenet2012"])
def test_prepared_data_sets_of_tfds_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real builder with its real features, its archives replaced by hand-made examples; prepared by our command."""
    builder_class = type(find_builder(name, tmp_path))

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: hand_made_examples(self.info.features, count) for split, count in (("train", 5), ("test", 2))}

    monkeypatch.setattr(builder_class, "_split_generators", split_generators)
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)  # of the extra `prepare`
    monkeypatch.setattr(prepare, "_has_tensorflow", lambda: True)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "any").touch()
    counts = prepare.prepare(name, tmp_path, tmp_path / "downloads")
    assert counts == {"train": 5, "test": 2}
    source = open_source(DataConfig(name=name, data_dir=str(tmp_path), image_size=7, channels=3), "train")
    records = [source[i] for i in range(len(source))]
    assert sorted(record["label"] for record in records) == [0, 1, 2, 3, 4]
    for record in records:
        np.testing.assert_array_equal(record["image"], np.full((9, 7, 3), record["label"]))
    assert len(open_source(DataConfig(name=name, data_dir=str(tmp_path), channels=3), "train[:3]+test")) == 5
