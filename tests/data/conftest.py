"""The digits, prepared once for all tests of the data code."""

from pathlib import Path

import pytest

from nag_jax.data.sources import DataConfig, Source, open_source, prepare_digits


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    prepare_digits(folder)
    return folder


@pytest.fixture(scope="session")
def config(data_dir: Path) -> DataConfig:
    return DataConfig(data_dir=str(data_dir))


@pytest.fixture(scope="session")
def train(config: DataConfig) -> Source:
    return open_source(config, config.split)
