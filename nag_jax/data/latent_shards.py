"""Latents on disk: the record, the shard, and the files that describe them, written whole or not at all.

The latents of a split are a folder:

    encoding.json                              what they are made of and how; written first
    latents-00000-of-00626.array_record        records k S … (k + 1) S - 1 of the data, S = `Encoding.shard_records`
    latents-00000-of-00626.json                what that shard holds; written after it, so it stands for a whole shard
    dataset.json                               all of it with totals; written last, so it stands for a whole folder

Record i holds the latents of the data's record i. Making them is `jobs/encode.py`'s, reading them for training
`latents.py`'s; nothing here knows the autoencoder or JAX.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from nag_jax import storage
from nag_jax.config import from_section
from nag_jax.data.sources import DataConfig
from nag_jax.denoiser import LatentSpace
from nag_jax.errors import UserError, first_line

RECORD_FORMAT = 1
ENCODING_FILE, DATASET_FILE = "encoding.json", "dataset.json"
# About 64 MiB a shard at 256 x 256 pixels: 2048 records of two orientations of 32 x 32 x 8 float16.
SHARD_RECORDS = 2048
# One record a chunk, so that any record is read alone; float16 moments hardly compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
FILES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What latents are made of and how: the content of `encoding.json`.

    Attributes:
      data, split, mock_examples: as in the `DataConfig` of the images.
      source: fingerprint of the images' source.
      count: number of records.
      num_classes: labels lie in [0, num_classes).
      image_size, channels: of the images that were encoded.
      crop: how they were brought to that size.
      vae: name of the autoencoder's weights.
      vae_fingerprint: content hash of all of them.
      latent: downsampling, encoder hash, and the scale that the stored moments do not have yet.
      latent_channels: channels of a latent.
      shard_records: records of a shard; the last may have fewer.
      record_format: version of the record's layout, `record_type`.
    """

    data: str
    split: str
    mock_examples: int
    source: str
    count: int
    num_classes: int
    image_size: int
    channels: int
    vae: str
    vae_fingerprint: str
    latent: LatentSpace
    latent_channels: int
    crop: str = "adm-center"
    shard_records: int = SHARD_RECORDS
    record_format: int = RECORD_FORMAT

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of a latent."""
        side = self.image_size // self.latent.downsampling
        return side, side, self.latent_channels

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_records)

    def shard_range(self, shard: int) -> range:
        """The records of a shard."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.count))

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def manifest_name(self, shard: int) -> str:
        """Name of the file beside a shard that says what it holds."""
        return self.shard_name(shard).removesuffix("array_record") + "json"

    def digest(self) -> str:
        """Content hash of all conditions."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard's manifest. The sums are over all positions, records and both orientations, of unscaled moments.

    Attributes:
      file: the shard's file name.
      encoding: digest of the `Encoding` that it was made under.
      first_record, count: which records it holds.
      sha256: content hash of its records in order.
      bytes: size of the file.
      mean_sum, mean_square_sum, variance_sum: float64 sums for each latent channel.
      class_counts: records of each class.
    """

    file: str
    encoding: str
    first_record: int
    count: int
    sha256: str
    bytes: int
    mean_sum: tuple[float, ...]
    mean_square_sum: tuple[float, ...]
    variance_sum: tuple[float, ...]
    class_counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A line of `dataset.json`'s list of shards; the attributes are those of `Shard`."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """The content of `dataset.json`.

    Attributes:
      encoding: the conditions.
      mean, std: of each channel of the unscaled latents' means.
      mean_variance: mean of each channel's variance, as the encoder gives it.
      class_counts: records of each class.
      shards: the files in order.
      sha256: content hash over the shards' hashes.
    """

    encoding: Encoding
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_variance: tuple[float, ...]
    class_counts: tuple[int, ...]
    shards: tuple[ShardFile, ...]
    sha256: str


def split_folder(config: DataConfig, split: str) -> epath.Path:
    """The folder of a split's latents in `data.latents`; characters that file systems dislike become "_".

    Raises:
      UserError: `data.latents` is not set.
    """
    if not config.latents:
        raise UserError("data.latents is not set. Set --config.data.latents=FOLDER, the folder of the latents.")
    return epath.Path(config.latents) / re.sub(r"[^A-Za-z0-9.+-]", "_", split)


def record_type(latent_shape: tuple[int, int, int]) -> np.dtype:
    """The layout of a record.

    Args:
      latent_shape: (h, w, C).

    Returns:
      A structured dtype without padding: the record's number; its label; moments float16 [2, h, w, 2 C] (the image as
      it is, then mirrored left to right; mean, then log-variance, unscaled); the CRC-32 of the bytes before it.
    """
    height, width, channels = latent_shape
    moments = (2, height, width, 2 * channels)
    return np.dtype([("index", "<i8"), ("label", "<i4"), ("moments", "<f2", moments), ("checksum", "<u4")])


def make_records(indices: np.ndarray, labels: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Records with their checksums.

    Args:
      indices: int [N], the records' numbers.
      labels: int [N].
      moments: float16 [N, 2, h, w, 2 C].

    Returns:
      [N] of `record_type`.
    """
    _, _, height, width, moment_channels = moments.shape
    records = np.empty(len(indices), record_type((height, width, moment_channels // 2)))
    records["index"], records["label"], records["moments"] = indices, labels, moments
    records["checksum"] = [_checksum(record.tobytes()) for record in records]
    return records


def parse_record(content: bytes, layout: np.dtype, index: int) -> tuple[np.ndarray, int]:
    """Moments float16 [2, h, w, 2 C] and label of a record's bytes.

    Raises:
      ValueError: they are not those of record `index`; says what they are.
    """
    if len(content) != layout.itemsize:
        raise ValueError(f"it has {len(content)} bytes instead of {layout.itemsize}")
    record = np.frombuffer(content, layout)[0]
    if int(record["checksum"]) != _checksum(content):
        raise ValueError("its bytes were altered")
    if int(record["index"]) != index:
        raise ValueError(f"it is record {int(record['index'])}")
    return record["moments"], int(record["label"])


def _checksum(content: bytes) -> int:
    return zlib.crc32(memoryview(content)[:-4])


def check_encoding(folder: epath.Path, encoding: Encoding) -> None:
    """Raises UserError, naming the differences, if a folder was begun under other conditions."""
    path = folder / ENCODING_FILE
    if not path.exists():
        return
    before, now = storage.read_json(path), storage.as_json(dataclasses.asdict(encoding))
    differing = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value
    ]
    if differing:
        raise UserError(
            f"{folder} holds latents made under other conditions: {'; '.join(differing)}. "
            "Choose another data.latents, or delete that folder."
        )


def begin(folder: epath.Path, encoding: Encoding) -> None:
    """Writes `encoding.json` into a new folder. Raises UserError if it was begun under other conditions."""
    check_encoding(folder, encoding)
    if not (folder / ENCODING_FILE).exists():
        storage.write_json(folder / ENCODING_FILE, dataclasses.asdict(encoding))


def read_encoding(folder: epath.Path) -> Encoding:
    """The conditions that a folder was begun under. Raises UserError if there are none, or damaged ones."""
    return from_section(Encoding, storage.read_json(folder / ENCODING_FILE), str(folder / ENCODING_FILE))


def write_shard(folder: epath.Path, encoding: Encoding, shard: int, records: np.ndarray) -> None:
    """Writes a shard and then its manifest; an old manifest is removed first.

    Args:
      folder: the split's folder.
      encoding: its conditions.
      shard: which shard.
      records: all its records in order, of `record_type`.

    Raises:
      NagJaxError: it cannot be written.
    """
    manifest = folder / encoding.manifest_name(shard)
    manifest.unlink(missing_ok=True)
    # The writer knows local files only and may leave half of one, so it writes elsewhere.
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "shard"
        writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
        for record in records:
            writer.write(record.tobytes())
        writer.close()
        content = file.read_bytes()
    storage.write_bytes(folder / encoding.shard_name(shard), content)
    mean, log_variance = np.split(records["moments"].astype(np.float64), 2, axis=-1)
    every_position = (0, 1, 2, 3)
    description = Shard(
        file=encoding.shard_name(shard),
        encoding=encoding.digest(),
        first_record=encoding.shard_range(shard).start,
        count=len(records),
        sha256=hashlib.sha256(records.tobytes()).hexdigest(),
        bytes=len(content),
        mean_sum=tuple(mean.sum(every_position)),
        mean_square_sum=tuple((mean**2).sum(every_position)),
        variance_sum=tuple(np.exp(log_variance).sum(every_position)),
        class_counts=tuple(np.bincount(records["label"], minlength=encoding.num_classes)),
    )
    storage.write_json(manifest, dataclasses.asdict(description))


def read_manifest(folder: epath.Path, encoding: Encoding, shard: int) -> Shard | None:
    """A shard's manifest; None if there is none.

    Raises:
      UserError: it is damaged, or of a shard made under other conditions.
    """
    path = folder / encoding.manifest_name(shard)
    if not path.exists():
        return None
    manifest = from_section(Shard, storage.read_json(path), str(path))
    if manifest.encoding != encoding.digest():
        raise UserError(
            f"{path} is of a shard made under other conditions than {folder / ENCODING_FILE} says. "
            "Delete it, and run --mode=encode again."
        )
    return manifest


def read_manifests(folder: epath.Path, encoding: Encoding, shards: Sequence[int]) -> list[Shard | None]:
    """`read_manifest` of several shards."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        return list(threads.map(lambda shard: read_manifest(folder, encoding, shard), shards))


def unfinished_shards(folder: epath.Path, encoding: Encoding, shards: Sequence[int]) -> list[int]:
    """Those of `shards` that must be made: without a manifest, or with a file that is missing or of a wrong size.

    Raises:
      UserError: see `read_manifest`.
    """
    manifests = read_manifests(folder, encoding, shards)
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        faults = threads.map(lambda manifest: manifest is None or file_fault(folder, manifest), manifests)
        return [shard for shard, fault in zip(shards, faults, strict=True) if fault]


def file_fault(folder: epath.Path, expected: Shard | ShardFile) -> str | None:
    """What is wrong with a shard's file at a glance, "… is missing" or its wrong size; None if nothing is."""
    path = folder / expected.file
    if not path.exists():
        return f"{path} is missing"
    size = path.stat().length
    return None if size == expected.bytes else f"{path} has {size:,} bytes instead of {expected.bytes:,}"


def check_files(folder: epath.Path, expected: Sequence[ShardFile]) -> None:
    """Raises UserError that names the shards whose files are missing or of a wrong size."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        faults = [fault for fault in threads.map(lambda each: file_fault(folder, each), expected) if fault]
    if faults:
        raise UserError(f"{_some(faults)}. Run --mode=encode again; it makes what is missing or short.")


def check_content(folder: epath.Path, encoding: Encoding, shard: int) -> None:
    """Reads a whole shard and compares its content hash with its manifest's. Raises UserError if it is another."""
    path, manifest = folder / encoding.shard_name(shard), read_manifest(folder, encoding, shard)
    digest = hashlib.sha256()
    try:
        reader = ArrayRecordReader(str(path))
        for record in range(reader.num_records()):
            digest.update(reader.read([record])[0])
        reader.close()
        fault = "" if manifest and digest.hexdigest() == manifest.sha256 else "its content hash is another"
    except Exception as error:  # array_record raises RuntimeError, ValueError and others
        fault = first_line(error)
    if fault:
        raise UserError(
            f"{path} was altered or damaged ({fault}). Delete {encoding.manifest_name(shard)} beside it and run "
            "--mode=encode again."
        )


def missing_shards(folder: epath.Path, encoding: Encoding) -> str:
    """How many shards have no manifest, and the first few of them."""
    manifests = read_manifests(folder, encoding, range(encoding.num_shards))
    missing = [encoding.shard_name(shard) for shard, manifest in enumerate(manifests) if manifest is None]
    return f"{len(missing)} of {encoding.num_shards} shards are missing: {_some(missing)}"


def _some(names: Sequence[str]) -> str:
    """The first few of a list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def finish(folder: epath.Path, encoding: Encoding) -> LatentDataset:
    """Writes `dataset.json` from all shards' manifests.

    Raises:
      UserError: shards are missing.
    """
    manifests = read_manifests(folder, encoding, range(encoding.num_shards))
    shards = [manifest for manifest in manifests if manifest is not None]
    if len(shards) < encoding.num_shards:
        raise UserError(f"{folder} is not complete: {missing_shards(folder, encoding)}. Run --mode=encode again.")
    height, width, _ = encoding.latent_shape
    positions = 2 * height * width * encoding.count

    def average(name: str) -> np.ndarray:
        return np.sum([getattr(shard, name) for shard in shards], axis=0) / positions

    mean, mean_square = average("mean_sum"), average("mean_square_sum")
    hashes = "\n".join(shard.sha256 for shard in shards)
    dataset = LatentDataset(
        encoding=encoding,
        mean=tuple(mean),
        std=tuple(np.sqrt(np.maximum(mean_square - mean**2, 0.0))),
        mean_variance=tuple(average("variance_sum")),
        class_counts=tuple(np.sum([shard.class_counts for shard in shards], axis=0)),
        shards=tuple(ShardFile(shard.file, shard.count, shard.bytes, shard.sha256) for shard in shards),
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
    )
    storage.write_json(folder / DATASET_FILE, dataclasses.asdict(dataset))
    return dataset


def read_dataset(folder: epath.Path) -> LatentDataset:
    """The content of a complete folder's `dataset.json`.

    Raises:
      UserError: there are no latents, encoding was not finished (names the missing shards), or the file is damaged.
    """
    path = folder / DATASET_FILE
    if path.exists():
        return from_section(LatentDataset, storage.read_json(path), str(path))
    if not (folder / ENCODING_FILE).exists():
        raise UserError(f"there are no latents in {folder}. Make them with --mode=encode under the same config.")
    missing = missing_shards(folder, read_encoding(folder))
    raise UserError(f"{folder} is not complete: {missing}. Run --mode=encode again; it goes on from there.")
