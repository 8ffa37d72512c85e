"""The command that prepares data sets: what it prints, what it refuses, and that nothing half done looks whole."""

import os
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
from nag_jax.errors import UserError

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


def test_other_numbers_of_images_than_published_are_told():
    assert prepare._differences("artbench10", {"train": 50_000, "test": 10_000}) == []
    assert prepare._differences("artbench10", {"train": 49_999, "test": 10_000}) == [
        "train has 49,999 images, not 50,000"
    ]
    assert prepare._differences("cifar10", {"train": 1}) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(28, "No space left on device"), None])
def test_interrupted_preparation_leaves_nothing_that_looks_whole(
    end: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped by Ctrl-C, a full disk or (None) kill -9 after some images of the second split."""

    def image(archive: Any, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        del archive
        for number in range(20):
            yield f"{number}", {"image": b"x", "label": number % 10, "file_name": f"{split}-{number}"}

    def cut_short(archive: Any, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, example in enumerate(image(archive, split)):
            if split == "test" and number == 5:
                if end is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise end  # type: ignore[misc]
            yield example

    manual = tmp_path / "manual"
    (manual / artbench10.ARCHIVE[1]).mkdir(parents=True)
    monkeypatch.setattr(artbench10, "_examples", cut_short)
    if end is None:
        pid = os.fork()
        if pid == 0:
            prepare.prepare("artbench10", tmp_path, manual)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    else:
        with pytest.raises((KeyboardInterrupt, prepare.NagJaxError), match="No space left|^$"):
            prepare.prepare("artbench10", tmp_path, manual)
    with pytest.raises(UserError, match="not prepared"):
        open_source(DataConfig(name="artbench10", data_dir=str(tmp_path)), "train")
    monkeypatch.setattr(artbench10, "_examples", image)
    assert prepare.prepare("artbench10", tmp_path, manual) == {"train": 20, "test": 20}
