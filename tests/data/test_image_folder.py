"""Image folders: what is listed, in which order, under which labels, and what the errors say."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from nag_jax.data.pipeline import eval_arrays, make_batches
from nag_jax.data.sources import DataConfig, Source, open_source
from nag_jax.errors import UserError

CLASSES = ("n01440764", "n01443537", "n02085620")
PER_CLASS = 8


def write_image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (grey, grey, grey)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/ and val/ of three classes; the grey level of an image is 10 x its label + its number."""
    suffixes = ("JPEG", "png", "webp", "jpg")
    for split, count in (("train", PER_CLASS), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                path = tmp_path / split / name / f"{name}_{number}.{suffixes[number % 4]}"
                write_image(path, 10 * label + number)
    (tmp_path / "train" / CLASSES[0] / ".hidden.png").write_bytes(b"not an image")
    (tmp_path / "train" / CLASSES[0] / "notes.txt").write_text("no image either")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "README.md").write_text("beside the splits")
    return tmp_path


def open_split(root: Path | str, split: str = "train", train_split: str = "train") -> Source:
    config = DataConfig(name="image_folder", data_dir=str(root), split=train_split, image_size=4, channels=3)
    return open_source(config, split)


def greys(source: Source) -> list[int]:
    return [round(float(source[i]["image"].mean())) for i in range(len(source))]


def test_every_image_is_there_once_with_the_label_of_its_sorted_class(root: Path):
    source = open_split(root)
    assert len(source) == 3 * PER_CLASS and source.num_classes == 3 and source.image_shape == (4, 4, 3)
    assert sorted(greys(source)) == sorted(10 * label + number for label in range(3) for number in range(PER_CLASS))
    assert [source[i]["label"] for i in range(len(source))] == [grey // 10 for grey in greys(source)]
    assert len(open_split(root, "val")) == 6


def test_order_mixes_the_classes_and_does_not_depend_on_the_place(root: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    root.rename(elsewhere)
    elsewhere_order, digest = greys(open_split(elsewhere)), open_split(elsewhere).fingerprint
    elsewhere.rename(root)
    assert elsewhere_order == greys(open_split(root)) and digest == open_split(root).fingerprint
    labels = np.array(elsewhere_order) // 10
    assert (np.diff(labels) < 0).any()  # sorted by class it would never fall


def test_fingerprint_changes_with_a_name_and_names_the_count(root: Path):
    before = open_split(root).fingerprint
    write_image(root / "train" / CLASSES[1] / "one_more.png", 3)
    after = open_split(root).fingerprint
    assert before.split()[1] != after.split()[1]
    assert before.endswith(" train 24") and after.endswith(" train 25")


def test_slices_and_sums_partition_the_images(root: Path):
    whole = greys(open_split(root))
    assert greys(open_split(root, "train[:75%]")) + greys(open_split(root, "train[75%:]")) == whole
    assert greys(open_split(root, "train+val")) == whole + greys(open_split(root, "val"))


def test_source_is_read_by_the_pipeline_and_can_be_pickled(root: Path):
    source = open_split(root)
    again = pickle.loads(pickle.dumps(source))
    assert greys(again) == greys(source)
    config = DataConfig(name="image_folder", data_dir=str(root), image_size=4, channels=3)
    batches = make_batches(source, config, batch_size=3 * PER_CLASS, seed=0, start_step=0)
    batch = next(batches)
    batches.close()
    assert sorted(batch["index"]) == list(range(3 * PER_CLASS))
    images, labels = eval_arrays(source, config)
    assert images.shape == (24, 4, 4, 3) and sorted(labels) == [0] * 8 + [1] * 8 + [2] * 8


def test_folders_and_tfds_number_the_imagenet_classes_alike(tmp_path: Path):
    names = tfds.builder("imagenet2012", data_dir=tmp_path).info.features["label"].names
    assert names == sorted(names) and names[0] == CLASSES[0]


def unknown_class(root: Path) -> None:
    write_image(root / "val" / "n09999999" / "a.png", 1)


def empty_class(root: Path) -> None:
    (root / "train" / "n00000000").mkdir()


def no_classes(root: Path) -> None:
    for path in (root / "val").iterdir():
        path.rename(root / f"moved_{path.name}")
    write_image(root / "val" / "ILSVRC2012_val_00000001.JPEG", 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown_class, "val has 1 class folder.*n09999999"),
        (empty_class, r"n00000000 has no images \(.bmp"),
        (no_classes, "val has no class folders; images must lie in .*val/CLASS/"),
    ],
)
def test_wrong_folders_are_named(root: Path, damage: Callable[[Path], None], message: str):
    damage(root)
    with pytest.raises(UserError, match=message):
        open_split(root, "val")
        open_split(root, "train")


def test_missing_folder_and_split_are_named(root: Path):
    with pytest.raises(UserError, match="set data.data_dir"):
        open_split("")
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_split(root / "nowhere")
    with pytest.raises(UserError, match="no split 'test'; folders in it: train, val"):
        open_split(root, "test")
    with pytest.raises(UserError, match="no split 'training'"):
        open_split(root, "val", train_split="training")
    with pytest.raises(UserError, match=r"train\[:x\]"):
        open_split(root, "train[:x]")
    with pytest.raises(UserError, match="has no images"):
        open_split(root, "train[:0]")


def test_damaged_image_is_named_when_it_is_read(root: Path):
    damaged = root / "train" / CLASSES[2] / "damaged.jpg"
    damaged.write_bytes((root / "train" / CLASSES[2] / f"{CLASSES[2]}_0.JPEG").read_bytes()[:200])
    with pytest.raises(UserError, match="n02085620/damaged.jpg cannot be read as an image"):
        greys(open_split(root))


def test_made_up_images_are_refused(root: Path):
    with pytest.raises(UserError, match="mock_examples"):
        open_source(DataConfig(name="image_folder", data_dir=str(root), mock_examples=3), "train")
