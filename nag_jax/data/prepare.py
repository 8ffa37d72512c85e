"""Prepares a data set once: from a download or a manual folder to array_record files, which every run then reads.

    python -m nag_jax.data.prepare food101 --data_dir=DIR                      downloads what is free
    python -m nag_jax.data.prepare df20m --data_dir=DIR --manual_dir=DOWNLOADS    what you downloaded yourself

Data sets of TFDS need TensorFlow for this step only, `pip install "nag_jax[prepare]"`; digits, df20m and artbench10 do
not. docs/data.md says for each data set what to download. The data set appears when it is whole: after an interruption
run the same command again; downloads are kept.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from nag_jax.data.builders import OWN_NAMES
from nag_jax.data.catalogue import DEFAULT_DATA_DIR, data_folder, find_builder
from nag_jax.data.fine_tuning_sets import FINE_TUNING_SETS
from nag_jax.errors import NagJaxError, UserError, first_line


def prepare(name: str, folder: epath.PathLike, manual_dir: epath.PathLike | None = None) -> dict[str, int]:
    """Write a data set as array_record files under `folder`, unless it is there.

    TFDS writes into a temporary folder and renames it, so the data set is there whole or not at all: a killed
    process leaves only a temporary folder, and of several processes at once the first to finish wins.

    Args:
      name: of one of our own builders or of TFDS's.
      folder: the TFDS data folder.
      manual_dir: where files lie that the user downloaded; None means `folder`/downloads/manual.

    Returns:
      The number of images of each split.

    Raises:
      UserError: an unknown data set, files are missing or damaged, TensorFlow is needed, or the data set is there in
        another format.
      NagJaxError: a download failed, or the disk is full.
    """
    import tensorflow_datasets as tfds

    if name == "image_folder":
        raise UserError("an image folder is read as it lies; there is nothing to prepare. Set data.data_dir to it.")
    builder = find_builder(name, folder)
    if builder.data_path.exists():
        return _counts(builder)
    if name not in OWN_NAMES and not _has_tensorflow():
        raise UserError(
            f'preparing {name!r} needs TensorFlow, reading it does not: pip install "nag_jax[prepare]" here, or '
            "prepare it on another machine and copy the folder."
        )
    manual = epath.Path(manual_dir).expanduser() if manual_dir else epath.Path(folder) / "downloads" / "manual"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not (manual.is_dir() and any(manual.iterdir())):
        instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise UserError(f"data set {name!r} must be downloaded by hand into {manual} (--manual_dir). {instructions}")
    try:
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(manual_dir=manual)
        )
    except ImportError as error:
        raise UserError(
            f"preparing {name!r} needs a package that is not installed ({first_line(error)}): "
            'pip install "nag_jax[prepare]"'
        ) from error
    except (tfds.download.DownloadError, tfds.download.download_manager.NonMatchingChecksumError) as error:
        # TFDS looks into the manual folder before it downloads.
        raise NagJaxError(
            f"a download of data set {name!r} failed: {first_line(error)} Run the same command again; a file that you "
            f"got elsewhere is taken, if it is the same, under its own name in {manual} (--manual_dir)."
        ) from error
    except OSError as error:
        if not builder.data_path.exists():  # else another process was faster
            raise NagJaxError(
                f"data set {name!r} could not be prepared in {folder}: {first_line(error)}. Run the command again."
            ) from error
    return _counts(builder)


def _counts(builder: Any) -> dict[str, int]:
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{builder.data_path} was prepared as {file_format}, which has no random access. "
            "Prepare it again with another --data_dir."
        )
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _differences(name: str, counts: Mapping[str, int]) -> list[str]:
    """Where the numbers of images are not the published ones."""
    published = [
        (split, number)
        for known in FINE_TUNING_SETS.values()
        if known.name == name
        for split, number in ((known.split, known.num_train), (known.eval_split, known.num_eval))
    ]
    return [f"{split} has {counts[split]:,} images, not {n:,}" for split, n in published if n != counts[split]]


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nag_jax.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="the data set, as in data.name")
    parser.add_argument("--data_dir", default="", help=f"default: $TFDS_DATA_DIR, or {DEFAULT_DATA_DIR}")
    parser.add_argument("--manual_dir", help="folder of your downloads; default: DATA_DIR/downloads/manual")
    given = parser.parse_args(arguments)
    folder = data_folder(given.data_dir)
    try:
        counts = prepare(given.name, folder, given.manual_dir)
    except NagJaxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    for difference in _differences(given.name, counts):
        print(f"warning: {difference} as published", file=sys.stderr, flush=True)
    sizes = ", ".join(f"{split} {number:,}" for split, number in counts.items())
    print(f"prepared: {given.name} in {folder}: {sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
