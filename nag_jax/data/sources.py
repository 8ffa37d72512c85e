"""Opening a data set: random access to the records of one split, with what a run must know about them.

Data sets are read through TFDS from array_record files, without TensorFlow, or are image folders (`image_folder`).
Which names there are is `catalogue`'s, preparing is `prepare`'s; the order of records, batches and augmentation are
`pipeline`'s.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from nag_jax.data import images
from nag_jax.data.catalogue import data_folder, find_builder, split_names
from nag_jax.data.image_folder import open_folder
from nag_jax.data.prepare import prepare
from nag_jax.errors import UserError, first_line

# Data sets whose files are no larger than this keep their decoded images in memory after the first reading.
KEEP_DECODED_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, and how an image is brought to the network's size.

    Attributes:
      name: "digits", "df20m", "artbench10", any TFDS image data set with features `image` and `label`
        ("imagenet2012", "cifar10", "imagenet_resized/64x64", …), or "image_folder".
      split: TFDS split to train on; slices such as "train[:90%]" work.
      eval_split: held-out split.
      data_dir: folder of the prepared data sets; "" means $TFDS_DATA_DIR, or ~/.cache/nag_jax/tfds where that
        is not set. For "image_folder" the folder that holds SPLIT/CLASS/images.
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
      fingerprint: data set, version (for an image folder a hash of the file names), split and count in one line, to
        be written beside results.
      records: the stored records; an image is encoded bytes, or pixels.
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
        except UserError:  # an image folder names the file
            raise
        except Exception as error:  # array_record, protobuf and Pillow each raise their own
            reason = first_line(error)
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
    if config.name == "image_folder":
        return _open_image_folder(config, split)
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


def prepare_digits(folder: epath.PathLike) -> None:
    """`prepare` the digits without its progress bars, unless they are there.

    Args:
      folder: the TFDS data folder.
    """
    if find_builder("digits", folder).data_path.exists():
        return
    logging.info("Preparing the data set digits in %s", folder)
    # TFDS announces a download of unknown size and draws many progress bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare("digits", folder)


def _open_image_folder(config: DataConfig, split: str) -> Source:
    if config.mock_examples:
        raise UserError(
            "data.mock_examples makes up images where the classes are known without the data; an image folder's are "
            "not. Set data.mock_examples=0, or data.name to a TFDS data set."
        )
    records = open_folder(config.data_dir, split, train_split=config.split)
    return Source(
        name=config.name,
        split=split,
        num_classes=len(records.classes),
        image_shape=(config.image_size, config.image_size, config.channels),
        fingerprint=f"{config.name} {records.digest} {split} {len(records)}",
        records=records,
    )


def _open_prepared(config: DataConfig, split: str) -> tuple[Any, Sequence[dict[str, Any]]]:
    """The TFDS builder and the records; images come encoded, so that every machine decodes them alike."""
    import tensorflow_datasets as tfds

    folder = data_folder(config.data_dir)
    if config.name == "digits":
        prepare_digits(folder)
    builder = find_builder(config.name, folder)
    if not builder.data_path.exists():
        raise UserError(
            f"data set {config.name!r} is not prepared in {folder}. Set data.data_dir (or TFDS_DATA_DIR) to the folder "
            f"that has it, or run python -m nag_jax.data.prepare {config.name} --data_dir={folder}; "
            "data.mock_examples=64 runs on made-up images."
        )
    known = sorted(builder.info.splits)
    if not set(split_names(split)) <= set(known):
        raise UserError(f"data set {config.name!r} has no split {split!r}; known splits: {', '.join(known)}")
    # All images, so that the masks of caltech_birds2011 are not decoded for nothing.
    features = builder.info.features.items()
    encoded = [key for key, feature in features if isinstance(feature, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
    try:
        records = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"data set {config.name!r} in {folder} was prepared as {builder.info.file_format.value}, which has no "
            f"random access. Prepare it elsewhere: python -m nag_jax.data.prepare {config.name} --data_dir=ANOTHER"
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
        builder = find_builder(config.name, data_folder(config.data_dir))
        made_up = builder.as_data_source(split)
        records = [{key: made_up[i][key] for key in ("image", "label")} for i in range(config.mock_examples)]
    return builder, records


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
