"""Opening data sets: what works without TensorFlow, and what the errors say."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from nag_jax.data.pipeline import eval_arrays
from nag_jax.data.sources import DataConfig, Source, open_source
from nag_jax.errors import UserError


def change(config: DataConfig, **keys: object) -> DataConfig:
    return dataclasses.replace(config, **keys)  # type: ignore[arg-type]


def test_source_describes_itself(config: DataConfig, train: Source):
    assert train.image_shape == (8, 8, 1) and train.num_classes == 10 and train.name == "digits"
    assert train.fingerprint == "digits 1.0.0 train 1297"
    with pytest.raises(IndexError):
        train[1297]


def test_split_slices_work(config: DataConfig, train: Source):
    head = open_source(config, "train[:100]")
    assert len(head) == 100
    np.testing.assert_array_equal(head[99]["image"], train[99]["image"])


def test_unknown_split_lists_the_known_ones(config: DataConfig):
    with pytest.raises(UserError, match=r"'valid'.*test, train"):
        open_source(config, "valid")
    with pytest.raises(UserError, match=r"train\[:x\]"):
        open_source(config, "train[:x]")


def test_unknown_data_set_names_near_ones(config: DataConfig):
    with pytest.raises(UserError, match="'imagenet2013'.*imagenet2012"):
        open_source(change(config, name="imagenet2013"), "train")


def test_unprepared_data_set_says_where_it_looked_and_what_to_do(config: DataConfig):
    with pytest.raises(UserError) as caught:
        open_source(change(config, name="imagenet2012"), "train")
    for part in ("imagenet2012", config.data_dir, "data_dir", "nag_jax.data.prepare imagenet2012", "mock_examples"):
        assert part in str(caught.value)


def test_data_set_without_label_is_refused(config: DataConfig):
    with pytest.raises(UserError, match="image.*label.*landmarks"):
        open_source(change(config, name="celeb_a"), "train")


@pytest.mark.parametrize("keys", [{"channels": 4}, {"image_size": 0}, {"mock_examples": -1}])
def test_impossible_keys_are_named(config: DataConfig, keys: dict[str, int]):
    with pytest.raises(UserError, match=next(iter(keys))):
        open_source(change(config, **keys), "train")


def test_damaged_record_is_named(config: DataConfig, tmp_path: Path):
    shutil.copytree(config.data_dir, tmp_path / "copy")
    shard = tmp_path / "copy" / "digits" / "1.0.0" / "digits-test.array_record-00000-of-00001"
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(byte ^ 0xFF for byte in content[middle : middle + 4096])
    shard.write_bytes(content)
    damaged = change(config, data_dir=str(tmp_path / "copy"))
    with pytest.raises(UserError, match=r"record \d+ of data set 'digits', split 'test'"):
        eval_arrays(open_source(damaged, "test"), damaged)


def test_mock_imagenet_is_repeatable_and_needs_no_data():
    mock = DataConfig(name="imagenet2012", mock_examples=5, image_size=16, channels=3)
    source = open_source(mock, "train")
    assert len(source) == 5 and source.num_classes == 1000 and "mock" in source.fingerprint
    images, labels = eval_arrays(source, mock)
    again, labels_again = eval_arrays(open_source(mock, "validation"), mock)
    assert images.shape == (5, 16, 16, 3) and labels.max() < 1000
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, labels_again)
