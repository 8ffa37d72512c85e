"""Data sets by name: which folder they lie in, which builder has them, what their splits are called.

Our own builders and all of TFDS's; nothing is prepared or read here.
"""

import difflib
import os
from typing import Any

from etils import epath

from nag_jax.data.builders import OWN_NAMES, own_builder
from nag_jax.errors import UserError

DEFAULT_DATA_DIR = "~/.cache/nag_jax/tfds"


def data_folder(data_dir: str = "") -> epath.Path:
    """The folder in which data sets are prepared and looked for.

    Args:
      data_dir: decides where it is not empty; else $TFDS_DATA_DIR, else ~/.cache/nag_jax/tfds.

    Returns:
      The folder; it need not exist.
    """
    return epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_DATA_DIR).expanduser()


def find_builder(name: str, folder: epath.PathLike) -> Any:
    """The TFDS builder of an image data set with classes.

    Args:
      name: of one of our own builders, or of TFDS's: "imagenet2012", "sun397/standard-part1-120k", "cifar10:3.0.2".
      folder: the data folder; a data set prepared in it under that name is found too.

    Returns:
      The builder. Its data set need not be prepared.

    Raises:
      UserError: no data set of that name, one without features `image` and `label`, or a package is missing.
    """
    import tensorflow_datasets as tfds

    if name in OWN_NAMES:
        return own_builder(name)(data_dir=folder)
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        known = sorted({*OWN_NAMES, "image_folder", *tfds.list_builders(with_community_datasets=False)})
        nearest = difflib.get_close_matches(name, known, n=4) or ["digits", "cifar10", "imagenet2012"]
        raise UserError(
            f"unknown data set {name!r}, and none of that name in {folder}. Nearest known: "
            f"{', '.join(nearest)} (tfds.list_builders() names all of TFDS's)."
        ) from error
    except ImportError as error:
        raise UserError(f"data set {name!r} needs a package that is not installed: {error}") from error
    features = builder.info.features
    usable = {"image", "label"} <= set(features) and isinstance(features["label"], tfds.features.ClassLabel)
    if not usable:
        raise UserError(
            f"data set {name!r} cannot be used: it needs features `image` and `label` (a class), "
            f"and has {', '.join(features)}"
        )
    return builder


def split_names(split: str) -> list[str]:
    """The splits that an expression such as "train[:90%]+validation" draws from: "train" and "validation"."""
    return [part.split("[")[0].strip() for part in split.split("+")]
