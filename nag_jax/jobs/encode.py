"""Encodes a data set into latents: `--mode=encode`.

Both splits go through the autoencoder's encoder, each image as it is and mirrored, and are written shard by shard into
`data.latents`; `data/latent_shards.py` says how. What is there already is checked and kept, so the same command goes on
after a stop. Of several processes of a job each makes its own shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys

import jax
import numpy as np
from etils import epath

from nag_jax import storage
from nag_jax.autoencoder import Autoencoder, read_autoencoder
from nag_jax.config import Config
from nag_jax.data import latent_shards
from nag_jax.data.latent_shards import Encoding
from nag_jax.data.pipeline import batches_of, parts_of
from nag_jax.data.sources import DataConfig, Source, open_source
from nag_jax.errors import UserError
from nag_jax.hosts import check_shared, is_first, wait_for_all
from nag_jax.jobs.experiment import ENVIRONMENT_FILE, environment
from nag_jax.jobs.interrupt import Stopped, StopRequest, stop_on_signals
from nag_jax.parallel import local_sharding
from nag_jax.progress import progress

# Images that a device encodes at once. A batch of this size keeps an accelerator busy at 256 x 256 pixels, and there
# its activations take a few GiB. It is no setting, so that the same images give the same latents to the last bit.
IMAGES_PER_DEVICE = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to do for one split.

    Attributes:
        source: its images.
        encoding: what its latents are made of and how.
        folder: where they go.
    """

    source: Source
    encoding: Encoding
    folder: epath.Path


def run(config: Config) -> str:
    """Encodes `data.split` and `data.eval_split` with the autoencoder in `data.vae`.

    Args:
        config: its `data` is read here.

    Returns:
        The folder that holds the latents.

    Raises:
        UserError: a setting is missing or does not fit the autoencoder, the folder holds latents made under other
            conditions, or a shard in it is damaged.
        Stopped: on Ctrl-C or SIGTERM; finished shards stay.
    """
    autoencoder = on_local_devices(open_autoencoder(config.data))
    process_index, process_count = jax.process_index(), jax.process_count()
    works = open_works(config.data, autoencoder)
    with stop_on_signals() as stop:
        for work in works:
            if is_first():
                latent_shards.begin(work.folder, work.encoding)
                record_environment(work)
            check_shared(work.folder / latent_shards.ENCODING_FILE)
            done = encode_shards(work, config.data, autoencoder, stop, process_index, process_count)
            print(done, file=sys.stderr, flush=True)
            wait_for_all(f"encoded {work.folder}")
            if is_first():
                latent_shards.finish(work.folder, work.encoding)
    wait_for_all("finish")
    return config.data.latents


def record_environment(work: Work) -> None:
    """Writes environment.json beside latents that are to be made: versions, device and compiler flags."""
    encoding = work.encoding
    if latent_shards.unfinished_shards(work.folder, encoding, range(encoding.num_shards)):
        storage.write_json(work.folder / ENVIRONMENT_FILE, environment())


def describe(config: Config) -> str:
    """What `run` would do, in a few lines; nothing is encoded or written.

    Raises:
        UserError: see `run`.
    """
    autoencoder = open_autoencoder(config.data)
    lines = ["mode          encode", f"autoencoder   {autoencoder.description.name} in {config.data.vae}"]
    for work in open_works(config.data, autoencoder):
        encoding = work.encoding
        done = encoding.num_shards - len(
            latent_shards.unfinished_shards(work.folder, encoding, range(encoding.num_shards))
        )
        size = encoding.count * latent_shards.record_type(encoding.latent_shape).itemsize
        lines += [
            f"images        {encoding.source} at {encoding.image_size} pixels",
            f"latents       {work.folder}: {encoding.count:,} records of shape {encoding.latent_shape}, "
            f"{size / 1e9:.3g} GB in {encoding.num_shards} shards, {done} of them done",
        ]
    return "\n".join(lines)


def open_autoencoder(config: DataConfig) -> Autoencoder:
    """The autoencoder in `data.vae`. Raises UserError if it is not set, cannot be read or does not fit the images."""
    if not config.vae:
        raise UserError("Encoding needs an autoencoder. Set --config.data.vae=FOLDER, a converted one.")
    autoencoder = read_autoencoder(config.vae)
    vae = autoencoder.description.config
    if vae.channels != config.channels or config.image_size % vae.downsampling:
        raise UserError(
            f"The autoencoder in {config.vae} takes images of {vae.channels} channels and a side that is a multiple of "
            f"{vae.downsampling}, but data.channels = {config.channels} and data.image_size = {config.image_size}."
        )
    return autoencoder


def open_works(config: DataConfig, autoencoder: Autoencoder) -> list[Work]:
    """What there is to do, for each split once.

    Raises:
        UserError: a split cannot be opened, or its folder is that of another split or made under other conditions.
    """
    works: dict[epath.Path, Work] = {}
    for split in dict.fromkeys([config.split, config.eval_split]):
        source, folder = open_source(config, split), latent_shards.split_folder(config, split)
        if folder in works:
            raise UserError(
                f"The splits {config.split!r} and {config.eval_split!r} have the same folder {folder}. "
                "Encode one at a time, under another data.latents each."
            )
        works[folder] = Work(source, make_encoding(config, source, autoencoder), folder)
        latent_shards.check_encoding(folder, works[folder].encoding)
    return list(works.values())


def make_encoding(config: DataConfig, source: Source, autoencoder: Autoencoder) -> Encoding:
    """The conditions under which a source's latents are made."""
    description = autoencoder.description
    return Encoding(
        data=config.name,
        split=source.split,
        mock_examples=config.mock_examples,
        source=source.fingerprint,
        count=len(source),
        num_classes=source.num_classes,
        image_size=config.image_size,
        channels=config.channels,
        vae=description.name,
        vae_fingerprint=description.fingerprint,
        latent=autoencoder.latent,
        latent_channels=description.config.latent_channels,
    )


def encode_shards(
    work: Work,
    config: DataConfig,
    autoencoder: Autoencoder,
    stop: StopRequest,
    process_index: int = 0,
    process_count: int = 1,
) -> str:
    """Checks this process' shards that are there and makes those that are not.

    Args:
        work: the images and where their latents go; `latent_shards.begin` was called.
        config: how images are read.
        autoencoder: see `on_local_devices`.
        stop: looked at before every batch.
        process_index, process_count: this process, and of how many; its shards are process_index, process_index +
            process_count, ….

    Returns:
        What was done, in one line.

    Raises:
        UserError: a shard that is there was altered, an image cannot be read, or its latents do not fit float16.
        Stopped: `stop` was asked for; finished shards stay.
    """
    folder, encoding = work.folder, work.encoding
    own = range(process_index, encoding.num_shards, process_count)
    missing = latent_shards.unfinished_shards(folder, encoding, own)
    there = [shard for shard in own if shard not in missing]
    if there:
        with progress(f"checking {encoding.split}", len(there)) as report_progress:
            for number, shard in enumerate(there):
                stop_if_asked(stop, f"{number} of {len(there)} finished shards are checked")
                latent_shards.check_content(folder, encoding, shard)
                report_progress(number + 1, "")
    if not missing:
        return f"{folder}: all {len(own)} shards were there and have the right content"
    (folder / latent_shards.DATASET_FILE).unlink(missing_ok=True)

    batch_size = IMAGES_PER_DEVICE * jax.local_device_count()
    parts = {shard: parts_of(encoding.shard_range(shard), batch_size) for shard in missing}
    reads = batches_of(work.source, config, [part for shard in missing for part in parts[shard]])
    done = sum(len(encoding.shard_range(shard)) for shard in there)
    total = sum(len(encoding.shard_range(shard)) for shard in own)
    with progress(f"encoding {encoding.split}", total, done) as report_progress, contextlib.closing(reads):
        for number, shard in enumerate(missing):
            records = []
            for part in parts[shard]:
                stop_if_asked(stop, f"{len(there) + number} of {len(own)} shards are finished")
                records.append(encode_batch(work, autoencoder, next(reads), batch_size))
                done += len(part)
                report_progress(done, "")
            latent_shards.write_shard(folder, encoding, shard, np.concatenate(records))
    return f"{folder}: {len(missing)} of {len(own)} shards encoded, the others were there and have the right content"


def encode_batch(work: Work, autoencoder: Autoencoder, batch: dict[str, np.ndarray], batch_size: int) -> np.ndarray:
    """Encodes some images, as they are and mirrored, always `batch_size` at once.

    Args:
        work: what they are of.
        autoencoder: see `on_local_devices`.
        batch: of `batches_of`, at most `batch_size` rows; it is filled up with its own images.
        batch_size: a multiple of this process' devices.

    Returns:
        Records of `latent_shards.record_type`.

    Raises:
        UserError: moments do not fit float16, or a label is none; names the record.
    """
    images, labels, indices = batch["image"], batch["label"], batch["index"]
    images = images[np.arange(batch_size) % len(indices)]
    orientations = [images, images[:, :, ::-1]]
    encoded = [autoencoder.encode(jax.device_put(each, local_sharding("data"))) for each in orientations]
    moments = np.stack([np.concatenate(each, axis=-1) for each in jax.device_get(encoded)], axis=1)[: len(indices)]
    with np.errstate(over="ignore"):
        halves = moments.astype(np.float16)
    for index, label, half, row in zip(indices, labels, halves, moments, strict=True):
        record = f"Record {index} of {work.source.fingerprint}"
        if not np.isfinite(half).all():
            raise UserError(
                f"{record} has latents that float16 cannot hold: moments between {row.min():.3g} and {row.max():.3g}. "
                "Look at the image, and whether data.vae is the right autoencoder."
            )
        if not 0 <= label < work.encoding.num_classes:
            raise UserError(
                f"{record} has the label {label}, not one of 0 ... {work.encoding.num_classes - 1}. "
                "Choose a split with labels."
            )
    return latent_shards.make_records(indices, labels, halves)


def on_local_devices(autoencoder: Autoencoder) -> Autoencoder:
    """The same autoencoder with its parameters on each of this process' devices."""
    return dataclasses.replace(autoencoder, params=jax.device_put(autoencoder.params, local_sharding()))


def stop_if_asked(stop: StopRequest, state: str) -> None:
    """Raises Stopped, saying `state`, if a signal came."""
    if stop:
        raise Stopped(stop, f"Stopped; {state}. The same command goes on from there.")
