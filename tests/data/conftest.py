"""The digits, prepared once for all tests of the data code, and latents made by hand."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from nag_jax.data import latent_shards
from nag_jax.data.latent_shards import Encoding, LatentDataset
from nag_jax.data.sources import DataConfig, Source, open_source, prepare_digits
from nag_jax.denoiser import LatentSpace


class HandMadeLatents:
    """Random latents of shape (2, 2, 3) and 3 classes, made with no autoencoder."""

    def encoding(self, count: int, shard_records: int = 4) -> Encoding:
        return Encoding(
            data="squares",
            split="train[:9%]",
            mock_examples=0,
            source=f"squares 1.0.0 train[:9%] {count}",
            count=count,
            num_classes=3,
            image_size=8,
            channels=1,
            vae="made-up",
            vae_fingerprint="f",
            latent=LatentSpace(0.5, 4, "e"),
            latent_channels=3,
            shard_records=shard_records,
        )

    def records(self, encoding: Encoding) -> np.ndarray:
        rng = np.random.default_rng(0)
        height, width, channels = encoding.latent_shape
        moments = rng.standard_normal((encoding.count, 2, height, width, 2 * channels)).astype(np.float16)
        return latent_shards.make_records(np.arange(encoding.count), rng.integers(0, 3, encoding.count), moments)

    def write(self, folder: epath.Path, encoding: Encoding, records: np.ndarray) -> LatentDataset:
        """Makes a complete folder."""
        latent_shards.begin(folder, encoding)
        for shard in range(encoding.num_shards):
            numbers = encoding.shard_range(shard)
            latent_shards.write_shard(folder, encoding, shard, records[numbers.start : numbers.stop])
        return latent_shards.finish(folder, encoding)


@pytest.fixture(scope="session")
def hand_made() -> HandMadeLatents:
    return HandMadeLatents()


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
