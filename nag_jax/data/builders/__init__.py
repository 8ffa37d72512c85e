"""TFDS builders of data sets that TFDS itself does not have; each is imported only where it is prepared or read."""

import importlib
from typing import Any

# Name of the data set -> module of this package and its class.
_OWN = {
    "artbench10": ("artbench10", "Artbench10"),
    "df20m": ("df20m", "Df20m"),
    "digits": ("digits", "Digits"),
}

OWN_NAMES = tuple(_OWN)


def own_builder(name: str) -> type[Any]:
    """The builder class of one of `OWN_NAMES`."""
    module, class_name = _OWN[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
