"""DF20M from hand-made archives of the public layout: 182 species, two tables, images matched by name."""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nag_jax.data.builders.df20m import NUM_CLASSES, TABLES
from nag_jax.data.prepare import prepare
from nag_jax.data.sources import DataConfig, open_source
from nag_jax.errors import UserError

Rows = list[dict[str, str]]


def jpeg(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, "jpeg", quality=95)
    return file.getvalue()


def make_rows() -> dict[str, Rows]:
    """One training image of each species, and a test image of every tenth. The image of species k is of grey k."""
    species = {"train": range(NUM_CLASSES), "test": range(0, NUM_CLASSES, 10)}
    return {
        split: [{"gbifID": "1", "image_path": f"{split}-{k}.jpg", "class_id": str(k), "species": "A, b"} for k in ids]
        for split, ids in species.items()
    }


def make_images() -> dict[str, bytes]:
    """Under .JPG, where the tables say .jpg."""
    rows = make_rows()
    return {
        row["image_path"].replace(".jpg", ".JPG"): jpeg(int(row["class_id"])) for split in rows for row in rows[split]
    }


def as_csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_archives(folder: Path, rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "DF20M-metadata.zip", "w") as archive:
        for split, table in rows.items():
            archive.writestr(TABLES[split], as_csv(table))
    with tarfile.open(folder / "DF20M-images.tar.gz", "w:gz") as archive_of_images:
        for name, content in images.items():
            member = tarfile.TarInfo(f"DF20M/{name}")
            member.size = len(content)
            archive_of_images.addfile(member, io.BytesIO(content))


def write_folders(folder: Path, rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    (folder / "DF20M").mkdir(parents=True)
    for split, table in rows.items():
        (folder / TABLES[split]).write_text(as_csv(table))
    for name, content in images.items():
        (folder / "DF20M" / name).write_bytes(content)


@pytest.mark.parametrize("write", [write_archives, write_folders])
def test_every_image_has_its_species_and_its_bytes(write: Callable[..., None], tmp_path: Path):
    write(tmp_path / "manual", make_rows(), make_images())
    assert prepare("df20m", tmp_path, tmp_path / "manual") == {"train": 182, "test": 19}
    config = DataConfig(name="df20m", data_dir=str(tmp_path), image_size=8, channels=3)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train.num_classes == 182 and train.fingerprint == "df20m 1.0.0 train 182"
    for source, labels in ((train, range(182)), (test, range(0, 182, 10))):
        assert sorted(source[i]["label"] for i in range(len(source))) == list(labels)
        for i in range(len(source)):
            assert source.records[i]["image"] == jpeg(source[i]["label"])
            np.testing.assert_allclose(source[i]["image"].astype(int), source[i]["label"], atol=3)


def no_images(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    images.clear()


def one_image_missing(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    del images["test-20.JPG"]


def image_twice(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    images["again/train-3.png"] = jpeg(3)


def no_class_column(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    for row in rows["train"]:
        del row["class_id"]


def gap(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    rows["train"] = [row for row in rows["train"] if row["class_id"] not in ("17", "30")]


def class_beyond(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    rows["train"][4]["class_id"] = "182"


def no_number(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    rows["test"][1]["class_id"] = ""


def listed_twice(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    rows["train"].append(rows["train"][0])


def in_both_tables(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    rows["test"][0]["image_path"] = "train-5.jpg"


def no_test_table(rows: dict[str, Rows], images: dict[str, bytes]) -> None:
    del rows["test"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_images, "DF20M-images.tar.gz lacks 182 of the 182 images of split 'train'"),
        (one_image_missing, "lacks 1 of the 19 images of split 'test', 'test-20' first"),
        (image_twice, "holds image 'train-3' twice"),
        (no_class_column, "train_metadata_PROD.csv has no column class_id; its columns: gbifID, image_path, species"),
        (gap, r"no image of class id 17, 30 \(2 of 182"),
        (class_beyond, "line 6: class_id '182' is none of 0 to 181"),
        (no_number, "public_test_metadata_PROD.csv, line 3: class_id ''"),
        (listed_twice, "line 184: image 'train-0' is listed a second time"),
        (in_both_tables, "1 images are in both tables .*'train-5'"),
        (no_test_table, "DF20M-metadata.zip has no DF20M-public_test_metadata_PROD.csv"),
    ],
)
def test_wrong_archives_are_named_and_leave_nothing(damage: Callable[..., None], message: str, tmp_path: Path):
    rows, images = make_rows(), make_images()
    damage(rows, images)
    write_archives(tmp_path / "manual", rows, images)
    with pytest.raises(UserError, match=message):
        prepare("df20m", tmp_path, tmp_path / "manual")
    assert not list(tmp_path.glob("df20m/*"))
    write_archives(tmp_path / "manual", make_rows(), make_images())  # mended, the same command works
    assert prepare("df20m", tmp_path, tmp_path / "manual")["train"] == 182


def test_missing_and_damaged_archives_are_named(tmp_path: Path):
    manual = tmp_path / "manual"
    write_archives(manual, make_rows(), make_images())
    (manual / "DF20M-images.tar.gz").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="none of DF20M-images.tar.gz.*It holds: DF20M-metadata.zip"):
        prepare("df20m", tmp_path, manual)
    (tmp_path / "elsewhere").rename(manual / "DF20M-images.tar.gz")
    (manual / "DF20M-metadata.zip").write_bytes((manual / "DF20M-metadata.zip").read_bytes()[:500])
    with pytest.raises(UserError, match="DF20M-metadata.zip is damaged or cut short"):
        prepare("df20m", tmp_path, manual)
