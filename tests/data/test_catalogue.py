"""Which folder, which builders, which splits."""

from pathlib import Path

import pytest

from nag_jax.data.builders import OWN_NAMES
from nag_jax.data.catalogue import data_folder, find_builder, split_names
from nag_jax.errors import UserError


def test_data_folder_follows_config_then_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/environment")
    assert str(data_folder("/from/config")) == "/from/config"
    assert str(data_folder()) == "/from/environment"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data_folder().parts[-2:] == ("nag_jax", "tfds")


def test_names_of_our_own_builders_are_those_that_tfds_gives_them(tmp_path: Path):
    assert [find_builder(name, tmp_path).name for name in OWN_NAMES] == list(OWN_NAMES)


def test_a_name_like_one_of_ours_is_told_ours(tmp_path: Path):
    with pytest.raises(UserError, match="'artbench'.*artbench10"):
        find_builder("artbench", tmp_path)


def test_splits_of_an_expression():
    assert split_names("train[:90%]+ validation") == ["train", "validation"]
