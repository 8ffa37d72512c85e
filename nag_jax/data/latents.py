"""Latents of a data set as training reads them: random access to the moments, and a state drawn from them.

They are made by `--mode=encode`; their files are `latent_shards.py`'s. No autoencoder is needed to read them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from nag_jax.data import latent_shards
from nag_jax.data.latent_shards import Encoding
from nag_jax.data.sources import DataConfig, open_source
from nag_jax.denoiser import LatentSpace
from nag_jax.errors import UserError, first_line
from nag_jax.models.vae import sample_latent


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Random access to one split's latents, with what a run must know about them. Can be pickled for workers.

    Attributes:
      name: the data set, as configured.
      split: the split, as configured.
      num_classes: labels lie in [0, num_classes).
      image_shape: (h, w, C) of a state, as the network sees it.
      fingerprint: source, content hash and autoencoder in one line, to be written beside results.
      latent: the space that scaled states are in.
      files: where each record lies: a file's name for every `records_per_file` of them.
      records_per_file: records of each file but the last.
      records: the stored bytes, of `latent_shards.record_type`.
    """

    name: str
    split: str
    num_classes: int
    image_shape: tuple[int, int, int]
    fingerprint: str
    latent: LatentSpace
    files: Sequence[str] = dataclasses.field(repr=False)
    records_per_file: int
    records: Sequence[bytes] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One record, checked.

        Args:
          index: in [0, len(self)).

        Returns:
          {"moments": float16 [2, h, w, 2 C], "label": int}; the image as it is and mirrored, unscaled mean and then
          log-variance along the last axis.

        Raises:
          IndexError: the index is out of range.
          UserError: the record cannot be read, or is not what was written; names shard and record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.fingerprint}")
        layout = latent_shards.record_type(self.image_shape)
        try:
            moments, label = latent_shards.parse_record(self.records[index], layout, index)
        except Exception as error:  # array_record raises RuntimeError, ValueError and others
            reason = first_line(error)
            raise UserError(
                f"record {index} in {self.files[index // self.records_per_file]} cannot be used ({reason}). "
                "Run --mode=encode again; it checks every shard."
            ) from error
        return {"moments": moments, "label": label}


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """A file and its number of records, told to array_record so that it does not open every file to count them."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def open_latents(config: DataConfig, split: str) -> LatentSource:
    """Open the latents of one split; with `data.mock_examples` set and none encoded, made-up ones.

    Every shard's presence and size is checked here, its content record by record as it is read.

    Args:
      config: `latents` is the folder; `name`, `image_size` and `channels` must be those that were encoded.
      split: usually `config.split` or `config.eval_split`.

    Returns:
      The source.

    Raises:
      UserError: there are none, encoding was not finished, shards are missing or short, or they are of other data.
    """
    folder = latent_shards.split_folder(config, split)
    if config.mock_examples and not (folder / latent_shards.DATASET_FILE).exists():
        return _open_mock(config, split)
    dataset = latent_shards.read_dataset(folder)
    encoding = dataset.encoding
    _check_conditions(folder, encoding, config, split)
    latent_shards.check_files(folder, dataset.shards)
    files = [str(folder / shard.file) for shard in dataset.shards]
    whole_files = [_WholeFile(file, shard.count) for file, shard in zip(files, dataset.shards, strict=True)]
    return LatentSource(
        name=config.name,
        split=split,
        num_classes=encoding.num_classes,
        image_shape=encoding.latent_shape,
        fingerprint=f"{encoding.source} latents {dataset.sha256[:12]} of VAE {encoding.vae}",
        latent=encoding.latent,
        files=files,
        records_per_file=encoding.shard_records,
        records=ArrayRecordDataSource(whole_files),
    )


def _check_conditions(folder: object, encoding: Encoding, config: DataConfig, split: str) -> None:
    wanted = {
        "data": config.name,
        "split": split,
        "mock_examples": config.mock_examples,
        "image_size": config.image_size,
        "channels": config.channels,
        "record_format": latent_shards.RECORD_FORMAT,
    }
    differing = [
        f"{key} is {getattr(encoding, key)!r} there and {value!r} here"
        for key, value in wanted.items()
        if getattr(encoding, key) != value
    ]
    if differing:
        raise UserError(
            f"{folder} holds latents of something else: {'; '.join(differing)}. "
            "Set data.latents to the folder of these data, or make one with --mode=encode."
        )


def _open_mock(config: DataConfig, split: str) -> LatentSource:
    """Random moments with the data set's labels, in the latent space of `data.vae` or else a made-up autoencoder."""
    from nag_jax.autoencoder import made_up_autoencoder, read_autoencoder

    images = open_source(config, split)
    autoencoder = read_autoencoder(config.vae) if config.vae else made_up_autoencoder()
    latent, channels = autoencoder.latent, autoencoder.description.config.latent_channels
    side, rest = divmod(config.image_size, latent.downsampling)
    if rest:
        raise UserError(f"data.image_size = {config.image_size} must be a multiple of {latent.downsampling}.")
    rng = np.random.default_rng(0)
    shape = (len(images), 2, side, side, channels)
    mean = rng.standard_normal(shape, np.float32) / latent.scaling_factor
    log_variance = rng.uniform(-8.0, -4.0, shape)
    moments = np.concatenate([mean, log_variance], axis=-1).astype(np.float16)
    labels = np.array([images[index]["label"] for index in range(len(images))])
    records = latent_shards.make_records(np.arange(len(images)), labels, moments)
    return LatentSource(
        name=config.name,
        split=split,
        num_classes=images.num_classes,
        image_shape=(side, side, channels),
        fingerprint=f"{images.fingerprint} latents",
        latent=latent,
        files=["memory"],
        records_per_file=len(images),
        records=[record.tobytes() for record in records],
    )


def sample_states(moments: jax.Array, keys: jax.Array, scaling_factor: float) -> jax.Array:
    """States drawn from moments, as training sees them; pure, for use inside a compiled step.

    Args:
      moments: [B, h, w, 2 C], unscaled mean and then log-variance along the last axis.
      keys: typed keys [B], one for the noise of each row.
      scaling_factor: of the latent space.

    Returns:
      float32 [B, h, w, C].
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return sample_latent(scaling_factor, mean, log_variance, noise)
