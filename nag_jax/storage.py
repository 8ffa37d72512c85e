"""Small files of a work folder: JSON and bytes, written whole or not at all, on local disks and object stores.

Checkpoints are `checkpoint.py`'s, metrics over time `metric_writer.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from nag_jax.errors import NagJaxError, UserError


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A file to write, of which a reader sees the old content or the whole new one, never a part.

    A local file is written beside its place and renamed; an object store publishes an object only when it is complete.

    Raises:
        NagJaxError: the file cannot be written (a full disk, no permission); an old file is left as it was.
    """
    path = epath.Path(path)
    is_remote = "://" in str(path)
    beside = path if is_remote else path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            yield file
        if not is_remote:
            beside.replace(path)
    except BaseException as error:
        if not is_remote:
            with contextlib.suppress(OSError):
                beside.unlink()
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise NagJaxError(f"Cannot write {path}: {reason}. Free space or choose another folder.") from error


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes `content` as `whole_file` does, with its errors."""
    with whole_file(path) as file:
        file.write(content)


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON; numpy values become numbers and lists, and NaN or infinity null."""
    write_bytes(path, (json.dumps(as_json(content), indent=2) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file. Raises UserError if it is missing or damaged."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it, and run the command that wrote it again.") from error


def as_json(value: Any) -> Any:
    """`value` as JSON can hold it: numpy values as numbers and lists, tuples as lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        return as_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)
