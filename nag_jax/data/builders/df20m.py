"""A TFDS builder of Danish Fungi 2020 - Mini (DF20M): 182 species, from its public archives; needs no TensorFlow.

Where each fact is from:
  182 species, 32,753 training and 3,640 test images: Picek et al., WACV 2022 (arXiv 2103.10107), which calls it
    "DF20 - Mini"; fine-tuning papers call it DF-20M.
  Names of the archives, their sizes: the README of the project, github.com/BohemianVRA/DanishFungiDataset.
  Columns `image_path` and `class_id`, labels that count from 0 without a gap: its experiments/DF20-Mini notebooks,
    which give class_id to a cross-entropy with as many outputs as there are distinct ids.
  Names of the two tables: users of the archive, several of whom read them under these names.
  The extension in `image_path` differs from the file's in places (the notebooks replace it), so images are matched
    without it.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from nag_jax.data.builders import archives
from nag_jax.errors import UserError

NUM_CLASSES = 182
IMAGES = ("DF20M-images.tar.gz", "DF20M-images", "DF20M")
METADATA = ("DF20M-metadata.zip", "DF20M-metadata", ".")
TABLES = {"train": "DF20M-train_metadata_PROD.csv", "test": "DF20M-public_test_metadata_PROD.csv"}
COLUMNS = ("image_path", "class_id")


class Df20m(tfds.core.GeneratorBasedBuilder):
    """The data set "df20m": splits `train` and `test`; `image` (bytes as downloaded), `label` and `file_name`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download DF20M-images.tar.gz and DF20M-metadata.zip (Danish Fungi 2020 - Mini) by the links in the README of "
        "github.com/BohemianVRA/DanishFungiDataset; unpacked folders serve too."
    )
    # Nothing is downloaded. Said here, TFDS need not search for a checksum file, for which it wants
    # importlib_resources.
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Danish Fungi 2020 - Mini: photographs of 182 species of fungi.",
            homepage="https://github.com/BohemianVRA/DanishFungiDataset",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        manual_dir = dl_manager.manual_dir
        images = archives.find(manual_dir, IMAGES)
        tables = read_tables(archives.find(manual_dir, METADATA))
        return {split: _examples(images, split, labels) for split, labels in tables.items()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        raise NotImplementedError("the splits carry their own generators")


def read_tables(source: epath.PathLike) -> dict[str, dict[str, int]]:
    """Both metadata tables, checked.

    Args:
      source: the zip, or a folder with the two files.

    Returns:
      {"train" and "test": {image name without folder and extension: label}}.

    Raises:
      UserError: a table or column is missing, class ids other than 0 to 181, or an image listed twice.
    """
    texts = {PurePosixPath(name).name: text for name, text in _read_csv_files(source)}
    missing = sorted(set(TABLES.values()) - set(texts))
    if missing:
        raise UserError(f"{source} has no {' and no '.join(missing)}. Download DF20M-metadata.zip again.")
    tables = {split: _read_table(texts[file], file) for split, file in TABLES.items()}
    both = sorted(set(tables["train"]) & set(tables["test"]))
    if both:
        raise UserError(f"{len(both)} images are in both tables of {source}, {both[0]!r} first; held-out data are not.")
    gaps = sorted(set(range(NUM_CLASSES)) - set(tables["train"].values()))
    if gaps:
        raise UserError(
            f"{TABLES['train']} has no image of class id {', '.join(map(str, gaps[:5]))} ({len(gaps)} of {NUM_CLASSES} "
            "ids are missing). It is cut short, or of another release than Danish Fungi 2020 - Mini."
        )
    return tables


def _read_csv_files(source: epath.PathLike) -> Iterator[tuple[str, bytes]]:
    # The manual folder itself may hold the tables beside unpacked images, which need not be walked.
    source = epath.Path(source)
    if source.is_dir():
        return ((path.name, path.read_bytes()) for path in sorted(source.glob("*.csv")))
    return archives.read_files(source, lambda name: name.endswith(".csv"))


def _read_table(text: bytes, file: str) -> dict[str, int]:
    rows = csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""))
    absent = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
    if absent:
        present = ", ".join(rows.fieldnames or ())
        raise UserError(f"{file} has no column {' and no '.join(absent)}; its columns: {present}")
    labels: dict[str, int] = {}
    for row in rows:
        name, class_id = _stem(row["image_path"]), row["class_id"]
        if not (class_id or "").isdecimal() or int(class_id) >= NUM_CLASSES:
            raise UserError(f"{file}, line {rows.line_num}: class_id {class_id!r} is none of 0 to {NUM_CLASSES - 1}.")
        if name in labels:
            raise UserError(f"{file}, line {rows.line_num}: image {name!r} is listed a second time.")
        labels[name] = int(class_id)
    return labels


def _examples(images: epath.Path, split: str, labels: dict[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys with their examples. Raises UserError at the end if the archive lacks an image, and nothing is kept then."""
    seen: set[str] = set()
    for path, content in archives.read_files(images, lambda path: _stem(path) in labels):
        name = _stem(path)
        if name in seen:
            raise UserError(f"{images} holds image {name!r} twice.")
        seen.add(name)
        yield name, {"image": content, "label": labels[name], "file_name": PurePosixPath(path).name}
    missing = sorted(set(labels) - seen)
    if missing:
        raise UserError(
            f"{images} lacks {len(missing)} of the {len(labels)} images of split {split!r}, {missing[0]!r} first. "
            "Download or unpack it again."
        )


def _stem(path: str) -> str:
    return PurePosixPath(path).stem
