"""Opening a data set: random access to the records of one split, with what a run must know about them.

Everything is read through TFDS from array_record files, without TensorFlow. The order of records, batches and
augmentation are `pipeline`'s.
"""

import contextlib
import dataclasses
import difflib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from nag_jax.data import images
from nag_jax.errors import UserError

DEFAULT_DATA_DIR = "~/.cache/nag_jax/tfds"

# Data sets whose files are no larger than this keep their decoded images in memory after the first reading.
KEEP_DECODED_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, and how an image is brought to the network's size.

    Attributes:
      name: "digits", or any TFDS image data set with features `image` and `label` ("imagenet2012", "cifar10",
        "imagenet_resized/64x64", …).
      split: TFDS split to train on; slices such as "train[:90%]" work.
      eval_split: held-out split.
      data_dir: folder of the prepared data sets; "" means $TFDS_DATA_DIR, or ~/.cache/nag_jax/tfds where that
        is not set.
      image_size: side of the square images in pixels; larger ones are centre-cropped as ADM does.
      channels: 1 (grey) or 3 (RGB).
      vae: folder of a converted autoencoder; latents are made by it and samples decoded by it. "" for images.
      latents: folder that `--mode=encode` writes the data's latents into and training reads them from; "" trains on
        images.
      random_flip: mirror each image left to right with probability 1/2, drawn anew each epoch.
      mock_examples: 0 reads real data; n > 0 makes up n random images with the data set's features, for
        trying a config without its data.
    """

    name: str = "digits"
    split: str = "train"
    eval_split: str = "test"
    data_dir: str = ""
    image_size: int = 8
    channels: int = 1
    vae: str = ""
    latents: str = ""
    random_flip: bool = False
    mock_examples: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to one split: `len(source)` records, `source[i]` one of them. Can be pickled for workers.

    Attributes:
      name: the data set, as configured.
      split: the split, as configured.
      num_classes: labels lie in [0, num_classes).
      image_shape: (image_size, image_size, channels), the shape after preprocessing; a stored image may have
        any size.
      fingerprint: data set, version, split and count in one line, to be written beside results.
      records: the stored records; an image is encoded bytes, or pixels where the data are made up.
      decoded: what was read so far, for a data set small enough to be kept in memory; None for others.
    """

    name: str
    split: str
    num_classes: int
    image_shape: tuple[int, int, int]
    fingerprint: str
    records: Sequence[dict[str, Any]] = dataclasses.field(repr=False)
    decoded: dict[int, tuple[np.ndarray, int]] | None = dataclasses.field(default=None, repr=False)

    @property
    def latent(self) -> None:
        """None: the states of a network on these data are images."""
        return None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The stored record, before any preprocessing.

        Args:
          index: in [0, len(self)).

        Returns:
          {"image": uint8 [H, W, 1 or 3], "label": int}.

        Raises:
          IndexError: the index is out of range.
          UserError: the record cannot be read or decoded.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.fingerprint}")
        if self.decoded is None:
            image, label = self._read(index)
        else:
            if index not in self.decoded:
                self.decoded[index] = self._read(index)
            image, label = self.decoded[index]
        return {"image": image, "label": label}

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        try:
            record = self.records[index]
            image = record["image"]
            if isinstance(image, bytes):
                image = images.decode_image(image)
            return image, int(record["label"])
        except Exception as error:  # array_record, protobuf and Pillow each raise their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"record {index} of data set {self.name!r}, split {self.split!r}, cannot be read ({reason}). "
                "Its files seem damaged: delete the data set's folder and prepare it again."
            ) from error


def open_source(config: DataConfig, split: str) -> Source:
    """Open one split. The digits are prepared at first use (about a second, no download).

    Args:
      config: which data set, from which folder, at which size.
      split: usually `config.split` or `config.eval_split`.

    Returns:
      The source.

    Raises:
      UserError: unknown data set or split, or a data set that is not prepared or has no image and label.
    """
    if config.channels not in (1, 3):
        raise UserError(f"data.channels is {config.channels}; it must be 1 (grey) or 3 (RGB)")
    if config.image_size < 1:
        raise UserError(f"data.image_size is {config.image_size}; it must be at least 1")
    if config.mock_examples < 0:
        raise UserError(f"data.mock_examples is {config.mock_examples}; it must be 0 or more")
    if config.mock_examples:
        builder, records = _open_mock(config, split)
        mock, keep = " mock", False
    else:
        builder, records = _open_prepared(config, split)
        mock, keep = "", builder.info.dataset_size <= KEEP_DECODED_BYTES
    return Source(
        name=config.name,
        split=split,
        num_classes=builder.info.features["label"].num_classes,
        image_shape=(config.image_size, config.image_size, config.channels),
        fingerprint=f"{config.name} {builder.info.version} {split} {len(records)}{mock}",
        records=records,
        decoded={} if keep else None,
    )


def data_folder(config: DataConfig) -> epath.Path:
    """The folder in which TFDS looks for the data set and where the digits are prepared.

    Args:
      config: its `data_dir` decides, else $TFDS_DATA_DIR, else ~/.cache/nag_jax/tfds.

    Returns:
      The folder; it need not exist.
    """
    return epath.Path(config.data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_DATA_DIR).expanduser()


def prepare_digits(folder: epath.PathLike) -> None:
    """Write the digits as array_record files under `folder`, unless they are there.

    TFDS writes into a temporary folder and renames it, so the data set is there whole or not at all: a killed
    process leaves only a temporary folder, and of several processes at once the first to finish wins.

    Args:
      folder: the TFDS data folder.
    """
    from nag_jax.data.builders.digits import Digits

    builder = Digits(data_dir=folder, file_format="array_record")
    if builder.data_path.exists():
        return
    logging.info("Preparing the data set digits in %s", folder)
    try:
        # TFDS announces a download of unknown size and draws many progress bars.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        if not builder.data_path.exists():
            raise


def _open_prepared(config: DataConfig, split: str) -> tuple[Any, Sequence[dict[str, Any]]]:
    """The TFDS builder and the records; images come encoded, so that every machine decodes them alike."""
    import tensorflow_datasets as tfds

    folder = data_folder(config)
    if config.name == "digits":
        prepare_digits(folder)
    builder = _builder(config, folder)
    if not builder.data_path.exists():
        raise UserError(
            f"data set {config.name!r} is not prepared in {folder}. Set data.data_dir (or TFDS_DATA_DIR) to "
            f'the folder that has it, or prepare it with tfds.builder("{config.name}", data_dir="{folder}")'
            '.download_and_prepare(file_format="array_record"); data.mock_examples=64 runs on made-up images.'
        )
    known = sorted(builder.info.splits)
    if split.split("[")[0].strip() not in known:
        raise UserError(f"data set {config.name!r} has no split {split!r}; known splits: {', '.join(known)}")
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"data set {config.name!r} in {folder} was prepared as {builder.info.file_format.value}, which "
            "has no random access. Prepare it again, into another folder, with "
            'download_and_prepare(file_format="array_record").'
        ) from error
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"split {split!r} of data set {config.name!r} cannot be read: {reason}") from error
    return builder, records


def _open_mock(config: DataConfig, split: str) -> tuple[Any, Sequence[dict[str, Any]]]:
    """Random records with the data set's features, the same for every split, 5 to 49 pixels where sizes vary.

    They are drawn here and kept: TFDS's mock works only while its patches are in place, and not in worker
    processes.
    """
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=config.mock_examples):
        builder = _builder(config, data_folder(config))
        made_up = builder.as_data_source(split)
        records = [{key: made_up[i][key] for key in ("image", "label")} for i in range(config.mock_examples)]
    return builder, records


def _builder(config: DataConfig, folder: epath.Path) -> Any:
    import tensorflow_datasets as tfds

    if config.name == "digits":
        from nag_jax.data.builders.digits import Digits

        return Digits(data_dir=folder, file_format="array_record")
    try:
        builder = tfds.builder(config.name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        known = sorted({"digits", *tfds.list_builders(with_community_datasets=False)})
        nearest = difflib.get_close_matches(config.name, known, n=4) or ["digits", "cifar10", "imagenet2012"]
        raise UserError(
            f"unknown data set {config.name!r}, and none of that name in {folder}. Nearest known: "
            f"{', '.join(nearest)} (tfds.list_builders() names all {len(known)})."
        ) from error
    except ImportError as error:
        raise UserError(f"data set {config.name!r} needs a package that is not installed: {error}") from error
    features = builder.info.features
    usable = {"image", "label"} <= set(features) and isinstance(features["label"], tfds.features.ClassLabel)
    if not usable:
        raise UserError(
            f"data set {config.name!r} cannot be used: it needs features `image` and `label` (a class), "
            f"and has {', '.join(features)}"
        )
    return builder


def load_example(source: Source, config: DataConfig, index: int) -> tuple[np.ndarray, int]:
    """One record at the network's size.

    Args:
      source: where from.
      config: `image_size` and `channels` are read here.
      index: the record.

    Returns:
      (uint8 image [image_size, image_size, channels], label).

    Raises:
      UserError: the record cannot be read.
    """
    record = source[index]
    return images.preprocess(record["image"], config.image_size, config.channels), record["label"]
