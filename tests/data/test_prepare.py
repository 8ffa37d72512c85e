"""The command that prepares data sets: what it prints, what it refuses, and that nothing half done looks whole."""

import importlib.resources.abc
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nag_jax.data import prepare
from nag_jax.data.builders import artbench10
from nag_jax.data.sources import DataConfig, open_source
from nag_jax.errors import NagJaxError, UserError

REPOSITORY = Path(__file__).parents[2]


def test_command_prepares_and_a_second_run_finds_it_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):
        assert prepare.main(["digits", f"--data_dir={tmp_path}"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"prepared: digits in {tmp_path}: train 1,297, test 500"
    assert len(open_source(DataConfig(data_dir=str(tmp_path)), "test")) == 500


def test_command_is_the_one_that_the_error_of_an_unprepared_set_names(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(name="df20m", data_dir=str(tmp_path)), "train")
    words = str(caught.value).split()
    start = words.index("python")
    command = [word.rstrip(";") for word in words[start : start + 5]]
    done = subprocess.run([sys.executable, *command[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "df20m' must be downloaded by hand" in done.stderr and f"{tmp_path}/downloads/manual" in done.stderr


def test_unknown_names_end_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert prepare.main(["artbench", f"--data_dir={tmp_path}"]) == 2
    assert "Nearest known: artbench10" in capsys.readouterr().err


def test_sets_of_tfds_ask_for_tensorflow_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "_has_tensorflow", lambda: False)
    with pytest.raises(UserError, match=r"'food101' needs TensorFlow, reading it does not: pip install .nag_jax\[prep"):
        prepare.prepare("food101", tmp_path)
    assert not list(tmp_path.iterdir())


def test_manual_data_sets_of_tfds_say_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare, "_has_tensorflow", lambda: True)
    with pytest.raises(UserError, match="by hand into .*/manual .*ILSVRC2012_img_train.tar"):
        prepare.prepare("imagenet2012", tmp_path, tmp_path / "manual")


def test_downloads_that_fail_say_where_a_file_got_elsewhere_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "food-101.tar.gz").write_bytes(b"another file")
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)  # of the extra `prepare`
    monkeypatch.setattr(prepare, "_has_tensorflow", lambda: True)
    with pytest.raises(NagJaxError, match="'food101' failed: .*food-101.tar.gz.* under its own name in .*/manual"):
        prepare.prepare("food101", tmp_path, tmp_path / "manual")
    assert not list(tmp_path.glob("food101/*"))


def test_an_image_folder_needs_no_preparation(tmp_path: Path):
    with pytest.raises(UserError, match="read as it lies"):
        prepare.prepare("image_folder", tmp_path)


def test_other_numbers_of_images_than_published_are_told():
    assert prepare._differences("artbench10", {"train": 50_000, "test": 10_000}) == []
    assert prepare._differences("artbench10", {"train": 49_999, "test": 10_000}) == [
        "train has 49,999 images, not 50,000"
    ]
    assert prepare._differences("cifar10", {"train": 1}) == []


def image_examples(archive: Any, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stands in for the reading of an archive."""
    for number in range(20):
        yield f"{number}", {"image": b"x", "label": number % 10, "file_name": f"{split}-{number}"}


@pytest.fixture
def manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manual folder for artbench10, whose reading is `image_examples`."""
    (tmp_path / "manual" / artbench10.ARCHIVE[1]).mkdir(parents=True)
    monkeypatch.setattr(artbench10, "_examples", image_examples)
    return tmp_path / "manual"


def check_nothing_looks_whole_and_the_next_try_works(folder: Path, manual: Path) -> None:
    with pytest.raises(UserError, match="not prepared"):
        open_source(DataConfig(name="artbench10", data_dir=str(folder)), "train")
    assert prepare.prepare("artbench10", folder, manual) == {"train": 20, "test": 20}


@pytest.mark.parametrize(
    ("end", "becomes"),
    [(KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left on device"), NagJaxError)],
)
def test_preparation_that_ends_early_leaves_nothing_that_looks_whole(
    end: Any, becomes: type[BaseException], manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def cut_short(archive: Any, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, example in enumerate(image_examples(archive, split)):
            if split == "test" and number == 5:
                raise end
            yield example

    with monkeypatch.context() as during:
        during.setattr(artbench10, "_examples", cut_short)
        with pytest.raises(becomes):
            prepare.prepare("artbench10", tmp_path, manual)
    check_nothing_looks_whole_and_the_next_try_works(tmp_path, manual)


KILLED = """
import os, signal, sys
from nag_jax.data.builders import artbench10
from nag_jax.data.prepare import prepare

def killed(archive, split):
    yield "0", {"image": b"x", "label": 0, "file_name": "0"}
    if split == "test":
        os.kill(os.getpid(), signal.SIGKILL)

artbench10._examples = killed
prepare("artbench10", sys.argv[1], sys.argv[2])
"""


def test_killed_preparation_leaves_nothing_that_looks_whole(manual: Path, tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(manual)], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    check_nothing_looks_whole_and_the_next_try_works(tmp_path, manual)
