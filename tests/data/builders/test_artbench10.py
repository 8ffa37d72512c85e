"""ArtBench-10 from a hand-made archive of the public layout."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from nag_jax.data.builders.artbench10 import STYLES
from nag_jax.data.prepare import prepare
from nag_jax.data.sources import DataConfig, open_source
from nag_jax.errors import UserError

TOP = "artbench-10-imagefolder-split"
COUNTS = {"train": 3, "test": 2}


def make_files() -> dict[str, bytes]:
    """The image of style k is of grey 20 k; file names recur in other styles and splits, as artists' works may."""
    files = {f"{TOP}/.DS_Store": b"x"}
    for label, style in enumerate(STYLES):
        file = io.BytesIO()
        Image.new("RGB", (256, 256), (20 * label,) * 3).save(file, "jpeg")
        for split, count in COUNTS.items():
            files |= {f"{TOP}/{split}/{style}/artist_work-{i}.jpg": file.getvalue() for i in range(count)}
    return files


def write_tar(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{TOP}.tar", "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_every_image_has_its_style_and_its_bytes(write, tmp_path: Path):
    files = make_files()
    write(tmp_path / "manual", files)
    assert prepare("artbench10", tmp_path, tmp_path / "manual") == {"train": 30, "test": 20}
    config = DataConfig(name="artbench10", data_dir=str(tmp_path), image_size=256, channels=3)
    for split, count in COUNTS.items():
        source = open_source(config, split)
        assert source.num_classes == 10
        assert sorted(source[i]["label"] for i in range(len(source))) == sorted(list(range(10)) * count)
        for i in range(len(source)):
            style = STYLES[source[i]["label"]]
            assert source.records[i]["image"] == files[f"{TOP}/{split}/{style}/artist_work-0.jpg"]


def test_a_style_too_few_or_too_many_is_named_and_leaves_nothing(tmp_path: Path):
    files = make_files()
    write_tar(tmp_path / "manual", {name: content for name, content in files.items() if "test/ukiyo_e" not in name})
    with pytest.raises(UserError, match="no images of ukiyo_e in split 'test'"):
        prepare("artbench10", tmp_path, tmp_path / "manual")
    write_tar(tmp_path / "manual", {**files, f"{TOP}/train/cubism/a.jpg": b"x"})
    with pytest.raises(UserError, match="a style 'cubism' in 'train'"):
        prepare("artbench10", tmp_path, tmp_path / "manual")
    assert not list(tmp_path.glob("artbench10/*"))
