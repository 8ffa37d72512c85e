"""Sets of images to be judged, as they are: an .npz of ADM's layout, or a folder of image files. Nothing is resized.

The layout is that of ADM's evaluator: arr_0 are images uint8 [N, H, W, C], arr_1 their labels if there are any.

These are anybody's samples and references; the data that networks train on are `sources.py`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath
from numpy.typing import NDArray

from nag_jax import storage
from nag_jax.data.images import decode_image
from nag_jax.errors import UserError
from nag_jax.metrics.reference import image_batches, read_reference

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
READ_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one shape in a fixed order.

    Attributes:
        path: the .npz file or the folder.
        files: names of the image files below a folder, sorted; none for an .npz file.
        count: number of images.
        image_shape: (H, W, 3); grey images are read as RGB.
    """

    path: str
    files: tuple[str, ...]
    count: int
    image_shape: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The name of the file without its ending, or of the folder."""
        return epath.Path(self.path).stem

    def batches(self, batch_size: int, first: int = 0) -> Iterator[NDArray[np.uint8]]:
        """The images from number `first` on.

        Args:
            batch_size: images a batch; the last may have fewer.
            first: a multiple of `batch_size`.

        Yields:
            uint8 [up to batch_size, H, W, 3].

        Raises:
            UserError: a file is damaged, or an image has another shape than the first.
        """
        if not self.files:
            for number, batch in enumerate(image_batches(self.path, batch_size)):
                if number * batch_size >= first:
                    yield _in_colour(batch)
            return
        for begin in range(first, self.count, batch_size):
            yield np.stack([self._read(name) for name in self.files[begin : begin + batch_size]])

    def fingerprint(self) -> str:
        """Content hash: SHA-256 of the .npz file, or of every image file's name and bytes. It reads everything."""
        digest = hashlib.sha256()
        for name in self.files or ("",):
            digest.update(name.encode())
            with (epath.Path(self.path) / name if name else epath.Path(self.path)).open("rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
        return digest.hexdigest()

    def _read(self, name: str) -> NDArray[np.uint8]:
        image = _decode(epath.Path(self.path) / name)
        if image.shape != self.image_shape:
            raise UserError(
                f"{epath.Path(self.path) / name} is an image of {list(image.shape[:2])} pixels, the first one of "
                f"{list(self.image_shape[:2])}. A metric judges images of one size: bring them to it first."
            )
        return image


def open_image_set(path: epath.PathLike) -> ImageSet:
    """Opens a set of images.

    Args:
        path: an .npz file with uint8 images [N, H, W, 3 or 1] as arr_0, or a folder of image files, at any depth.

    Raises:
        UserError: there is no such file, or it holds no images.
    """
    path = epath.Path(path)
    if not path.is_dir():
        shape = read_reference(path).image_shape
        if shape is None:
            raise UserError(f"{path} holds statistics and no images (arr_0), so it can only be a reference.")
        count, height, width, channels = shape
        if channels not in (1, 3):
            raise UserError(f"{path} has images of {channels} channels; a metric judges RGB or grey ones.")
        return ImageSet(str(path), (), count, (height, width, 3))
    names = []
    for folder, _, files in os.walk(os.fspath(path)):
        inner = os.path.relpath(folder, os.fspath(path))
        names += [os.path.normpath(os.path.join(inner, file)) for file in files if not file.startswith(".")]
    images = tuple(sorted(name for name in names if name.lower().endswith(SUFFIXES)))
    if not images:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}). Give a folder of images or an .npz file.")
    height, width, channels = _decode(path / images[0]).shape
    return ImageSet(str(path), images, len(images), (height, width, channels))


def write_image_set(path: epath.PathLike, batches: Iterable[NDArray[np.uint8]], labels: NDArray[np.integer]) -> None:
    """Writes images as an .npz of ADM's layout, batch by batch, so that they are never all in memory.

    Args:
        path: the file.
        batches: uint8 [n, H, W, C] each, of one image shape, at least one.
        labels: [N], of all of them.

    Raises:
        NagJaxError: it cannot be written.
        ValueError: another number of images than of labels.
    """
    batches = iter(batches)
    first = next(batches)
    count = 0
    # zip64 for more than 4 GiB of images; no compression, as ADM's files are.
    with storage.whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (len(labels), *first.shape[1:])
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for batch in itertools.chain([first], batches):
                if batch.dtype != np.uint8 or batch.shape[1:] != first.shape[1:]:
                    raise ValueError(f"images are {batch.dtype} {batch.shape[1:]}, the first ones {first.shape[1:]}")
                member.write(np.ascontiguousarray(batch).data)
                count += len(batch)
        if count != len(labels):
            raise ValueError(f"{count} images for {len(labels)} labels")
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels), allow_pickle=False)


def _decode(path: epath.Path) -> NDArray[np.uint8]:
    try:
        image = decode_image(path.read_bytes())
    except UserError:
        raise
    except Exception as error:  # Pillow raises its own, OSError and ValueError
        raise UserError(f"{path} cannot be read as an image ({error}). Remove it or make it anew.") from error
    return _in_colour(image)


def _in_colour(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey images as RGB; others as they are."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
