"""An archive and its unpacked folder give the same files, and a damaged one is never taken for a whole one."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nag_jax.data.builders.archives import find, read_files
from nag_jax.errors import UserError

# Contents that no compression makes small, so that cutting an archive cuts them.
FILES = {f"top/{name}.jpg": np.random.default_rng(i).bytes(20_000) for i, name in enumerate(("b", "a", "c"))}
HIDDEN = {"top/._a.jpg": b"x", "__MACOSX/top/a.jpg": b"x", "top/.DS_Store": b"x"}


def write_folder(path: Path) -> None:
    for name, content in (FILES | HIDDEN).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (FILES | HIDDEN).items():
            archive.writestr(name, content)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in (FILES | HIDDEN).items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


WRITERS = {"folder": write_folder, "some.zip": write_zip, "some.tar": write_tar, "some.tar.gz": write_tar}


@pytest.mark.parametrize("name", WRITERS)
def test_wanted_files_are_read_and_hidden_ones_never_offered(name: str, tmp_path: Path):
    WRITERS[name](tmp_path / name)
    offered: list[str] = []

    def wanted(inside: str) -> bool:
        offered.append(inside)
        return inside != "top/c.jpg"

    assert dict(read_files(tmp_path / name, wanted)) == {key: FILES[key] for key in ("top/a.jpg", "top/b.jpg")}
    assert sorted(offered) == sorted(FILES)


@pytest.mark.parametrize("name", ["some.zip", "some.tar", "some.tar.gz"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_archives_cut_short_are_named(name: str, kept: float, tmp_path: Path):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=f"{name} is damaged or cut short"):
        list(read_files(tmp_path / name, lambda inside: True))


@pytest.mark.parametrize("name", ["some.zip", "some.tar.gz"])
def test_flipped_bits_are_noticed(name: str, tmp_path: Path):
    WRITERS[name](tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 0x55
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="Download it again"):
        list(read_files(tmp_path / name, lambda inside: True))


def test_a_web_page_saved_as_an_archive_is_named(tmp_path: Path):
    (tmp_path / "some.tar.gz").write_text("<html>quota exceeded</html>")
    with pytest.raises(UserError, match="some.tar.gz is damaged"):
        list(read_files(tmp_path / "some.tar.gz", lambda inside: True))


def test_the_preferred_name_is_found_first_and_a_missing_one_lists_what_is_there(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images.tar").touch()
    assert find(tmp_path, ("images.tar", "images")) == tmp_path / "images.tar"
    with pytest.raises(UserError, match="none of a.zip, a is in .*It holds: images, images.tar"):
        find(tmp_path, ("a.zip", "a"))
