"""Small files of a work folder: JSON and bytes, written whole or not at all, on local disks and object stores.

Checkpoints are `checkpoint.py`'s, metrics over time `metric_writer.py`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import fsspec.config
import numpy as np
from etils import epath

from nag_jax.errors import NagJaxError, UserError

# The clients of object stores remember what is in a folder for as long as a process lives, and would never see what
# another host has written since. These are settings of fsspec's own, which hold for clients made from here on.
for _scheme in ("gs", "s3"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)

LARGEST_IN_MEMORY = 64 * 2**20  # bytes of a file for an object store; a larger one is collected on disk


def is_object_store(path: epath.PathLike) -> bool:
    """Whether `path` lies in an object store such as gs://, which neither appends to a file nor renames one."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A file to write, of which a reader sees the old content or the whole new one, never a part.

    A local file is written beside its place and renamed. What goes to an object store is collected on this machine and
    sent when it is complete: the store's own files publish what they hold when they are closed, after an error too.

    Raises:
        NagJaxError: the file cannot be written (a full disk, no permission); an old file is left as it was.
    """
    path = epath.Path(path)
    with explained(path), _sent_when_whole(path) if is_object_store(path) else _renamed_when_whole(path) as file:
        yield file


@contextlib.contextmanager
def explained(path: epath.PathLike) -> Iterator[None]:
    """Within the block the system's error, such as that of a full disk, becomes a NagJaxError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NagJaxError(f"Cannot write {path}: {reason}. Free space or choose another folder.") from error


@contextlib.contextmanager
def _renamed_when_whole(path: epath.Path) -> Iterator[IO[bytes]]:
    beside = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            yield file
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


@contextlib.contextmanager
def _sent_when_whole(path: epath.Path) -> Iterator[IO[bytes]]:
    with tempfile.SpooledTemporaryFile(max_size=LARGEST_IN_MEMORY) as collected:
        yield collected  # type: ignore[misc]  # an IO[bytes] in all but its declared bases
        collected.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(collected, file, LARGEST_IN_MEMORY)


class GrowingObject:
    """A file of an object store that grows: kept in memory, and sent whole by every `flush`. For small files only.

    Args:
        path: where it is published.
        content: what it begins with.
    """

    def __init__(self, path: epath.PathLike, content: bytes = b"") -> None:
        self._path = epath.Path(path)
        self._content = bytearray(content)

    def write(self, content: bytes) -> None:
        """Adds to what the next `flush` sends."""
        self._content += content

    def flush(self) -> None:
        """Sends all that was written. Raises NagJaxError if that fails."""
        write_bytes(self._path, bytes(self._content))

    def close(self) -> None:
        """The last `flush`."""
        self.flush()


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


def digest(content: Any) -> str:
    """Eight hexadecimal digits that differ between contents that `write_json` can write."""
    return hashlib.sha256(json.dumps(as_json(content), sort_keys=True).encode()).hexdigest()[:8]


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
