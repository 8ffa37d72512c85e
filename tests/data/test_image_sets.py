"""Sets of images to be judged: the same images from an .npz and from a folder, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nag_jax.data.image_sets import open_image_set, write_image_set
from nag_jax.errors import UserError


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """Image i as a PNG file, in two subfolders, so that sorted names are the order."""
    for i, image in enumerate(images):
        path = folder / ("a" if i < 4 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("none either")
    return folder


@pytest.mark.parametrize("first", [0, 2, 4, 6])
def test_a_folder_and_a_file_give_the_same_batches(images: np.ndarray, tmp_path: Path, first: int):
    np.savez(tmp_path / "set.npz", images)
    for found in (open_image_set(tmp_path / "set.npz"), open_image_set(write_folder(tmp_path / "set", images))):
        assert (found.count, found.image_shape) == (7, (6, 5, 3))
        batches = list(found.batches(2, first))
        assert [len(batch) for batch in batches] == [2] * ((7 - first) // 2) + [1]
        np.testing.assert_array_equal(np.concatenate(batches), images[first:])


def test_the_fingerprint_is_of_the_content(images: np.ndarray, tmp_path: Path):
    one, other = (write_folder(tmp_path / name, images) for name in ("one", "other"))
    assert open_image_set(one).fingerprint() == open_image_set(other).fingerprint()
    Image.fromarray(255 - images[6]).save(other / "b" / "6.png")
    assert open_image_set(one).fingerprint() != open_image_set(other).fingerprint()


def test_grey_images_become_rgb(tmp_path: Path):
    grey = np.arange(30, dtype=np.uint8).reshape(6, 5)
    Image.fromarray(grey).save(tmp_path / "0.png")
    np.savez(tmp_path / "set.npz", grey[None, :, :, None])
    for path in (tmp_path, tmp_path / "set.npz"):
        found = open_image_set(path)
        (batch,) = found.batches(4)
        np.testing.assert_array_equal(batch[0], np.repeat(grey[:, :, None], 3, axis=-1))
        assert found.image_shape == (6, 5, 3)


def test_what_is_written_in_parts_is_adm_s_file(images: np.ndarray, tmp_path: Path):
    labels = np.arange(7, dtype=np.int32)
    write_image_set(tmp_path / "set.npz", [images[:3], images[3:4], images[4:]], labels)
    with np.load(tmp_path / "set.npz") as found:
        assert found.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(found["arr_0"], images)
        np.testing.assert_array_equal(found["arr_1"], labels)
    np.testing.assert_array_equal(np.concatenate(list(open_image_set(tmp_path / "set.npz").batches(4))), images)
    before = (tmp_path / "set.npz").read_bytes()
    with pytest.raises(ValueError, match="6 images for 7 labels"):
        write_image_set(tmp_path / "set.npz", [images[:6]], labels)
    assert (tmp_path / "set.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_set_of_images_is_named(images: np.ndarray, tmp_path: Path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="statistics and no images"):
        open_image_set(tmp_path / "statistics.npz")
    with pytest.raises(UserError, match="does not exist"):
        open_image_set(tmp_path / "none.npz")
    with pytest.raises(UserError, match="holds no images"):
        open_image_set(tmp_path)
    folder = write_folder(tmp_path / "set", images)
    Image.fromarray(images[6, :4]).save(folder / "b" / "6.png")
    with pytest.raises(UserError, match=r"6.png is an image of \[4, 5\] pixels, the first one of \[6, 5\]"):
        list(open_image_set(folder).batches(7))
    (folder / "b" / "6.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="6.png cannot be read as an image"):
        list(open_image_set(folder).batches(7))
