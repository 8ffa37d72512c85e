"""An image folder read as it lies: ROOT/SPLIT/CLASS/FILE, as torchvision and ImageNet's unpacked archives have it.

The names are listed once, when the folder is opened; bytes are read record by record. Nothing is written, and nothing
is kept between runs: what TFDS prepares is read faster, above all from network storage.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from nag_jax.data.catalogue import split_names
from nag_jax.data.images import decode_image
from nag_jax.errors import UserError, first_line

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder(Sequence[dict[str, Any]]):
    """The records of one split. Can be pickled for workers.

    Attributes:
      root: the folder of the splits.
      classes: the training split's class folders, sorted; a label is a place in them.
      files: [N] bytes, "SPLIT/CLASS/FILE" of each record.
      labels: [N] int32.
    """

    root: str
    classes: tuple[str, ...]
    files: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices of records
        """{"image": uint8 [H, W, 1 or 3], "label": int}. Raises UserError, with the file's name, if it is damaged."""
        path = epath.Path(self.root) / os.fsdecode(bytes(self.files[index]))
        try:
            image = decode_image(path.read_bytes())
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more, whatever the format
            reason = first_line(error)
            raise UserError(f"{path} cannot be read as an image ({reason}). Restore it, or delete it.") from error
        return {"image": image, "label": int(self.labels[index])}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change when a file is added, removed or renamed; contents are not read."""
        return hashlib.sha256(b"\n".join(self.files.tolist())).hexdigest()[:16]


def open_folder(root: str, split: str, *, train_split: str) -> ImageFolder:
    """List the images of a split, in an order that mixes the classes and is the same everywhere.

    The order is that of the hashes of CLASS/FILE: so the first n records, or a slice, are a random sample, and not the
    first classes. Hidden files and files of other types are passed over.

    Args:
      root: the folder of the splits, local or on an object store.
      split: "val", a slice "train[:95%]", or a sum, in TFDS's notation.
      train_split: of which split the class folders count, also in that notation.

    Returns:
      The records.

    Raises:
      UserError: no such folder or split, no images, a class that training does not have, or a wrong expression.
    """
    import tensorflow_datasets as tfds

    if not root:
        raise UserError("data set image_folder needs its folder: set data.data_dir to the one that holds SPLIT/CLASS.")
    folder = epath.Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.data_dir {folder} does not exist or is no folder; it must hold SPLIT/CLASS/images.")
    known = _folders_in(folder)
    for name in (*split_names(split), *split_names(train_split)):
        if name not in known:
            raise UserError(f"{folder} has no split {name!r}; folders in it: {', '.join(known) or 'none'}")

    classes = tuple(sorted({c for name in split_names(train_split) for c in _classes_in(folder / name)}))
    listed = {name: _images_in(folder, name, classes) for name in split_names(split)}
    sizes = {name: tfds.core.SplitInfo(name=name, shard_lengths=[len(x)], num_bytes=0) for name, x in listed.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split!r} of {folder} cannot be read: {str(error).splitlines()[0]}") from error
    files = [file for part in parts for file in listed[part.splitname][part.from_ : part.to]]
    if not files:
        raise UserError(f"split {split!r} of {folder} has no images")
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[file.split("/")[1]] for file in files], np.int32)
    return ImageFolder(str(folder), classes, np.array([os.fsencode(file) for file in files]), labels)


def _folders_in(folder: epath.Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name[0] != "." and entry.is_dir())


def _classes_in(split_folder: epath.Path) -> list[str]:
    names = _folders_in(split_folder)
    if not names:
        raise UserError(f"{split_folder} has no class folders; images must lie in {split_folder}/CLASS/")
    return names


def _images_in(folder: epath.Path, split: str, classes: tuple[str, ...]) -> list[str]:
    """SPLIT/CLASS/FILE of every image, ordered by hash."""
    names = _classes_in(folder / split)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{folder / split} has {len(unknown)} class folder(s) that the training split has not: "
            f"{', '.join(unknown[:5])}. Both must be named alike."
        )
    files = []
    for name in names:
        entries = [entry.name for entry in (folder / split / name).iterdir()]
        images = [entry for entry in entries if entry[0] != "." and entry.lower().endswith(SUFFIXES)]
        if not images:
            raise UserError(f"{folder / split / name} has no images ({', '.join(SUFFIXES)}). Delete the empty class.")
        files += [f"{name}/{image}" for image in images]
    files.sort(key=lambda file: hashlib.sha256(os.fsencode(file)).digest())
    return [f"{split}/{file}" for file in files]
