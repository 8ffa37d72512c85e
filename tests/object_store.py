"""A stand-in for an object store, for tests: gs:// in memory, as strict as the real ones.

Nothing can be appended to or renamed, there are no folders but those that names imply, and a file that is closed is
published with what it holds, after an error too. What it is not: a client of Google's (see `gcsfs`), or a store that
orbax and array_record can reach, which read and write by code of their own.
"""

from __future__ import annotations

import io
from typing import Any

import fsspec
import pytest
from etils.epath import backend


class Refused(OSError):
    """Something that object stores cannot do."""


class _Object(io.BytesIO):
    """A file being written; published by close, as fsspec's files are."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if not self.closed:
            self._store.objects[self._path] = self.getvalue()
            self._store.writes.append(self._path)
        super().close()


class ObjectStore(fsspec.AbstractFileSystem):
    """One bucket after another, in memory. `objects`: path without gs:// → bytes; `writes`: every publication."""

    protocol = ("gs", "gcs")
    cachable = False
    objects: dict[str, bytes]
    writes: list[str]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode == "wb":
            return _Object(self, path)
        if mode != "rb":
            raise Refused(f"object stores cannot open {path} as {mode!r}")
        if path not in self.objects:
            raise FileNotFoundError(path)
        return io.BytesIO(self.objects[path])

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        if path in self.objects:
            entries = {path: self._entry(path)}
        else:
            below = [name for name in self.objects if name.startswith(path + "/")]
            children = {path + "/" + name[len(path) + 1 :].partition("/")[0] for name in below}
            entries = {name: self._entry(name) for name in sorted(children)}
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def _entry(self, path: str) -> dict[str, Any]:
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file", "mtime": self.writes.index(path)}
        return {"name": path, "size": 0, "type": "directory"}

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """There are no folders to make."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders to make."""

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        if path not in self.objects and not any(name.startswith(path + "/") for name in self.objects):
            raise FileNotFoundError(path)
        self.objects.pop(path, None)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = self._strip_protocol(path)
        if not recursive:
            self.rm_file(path)
            return
        for name in [name for name in self.objects if name == path or name.startswith(path + "/")]:
            self.rm_file(name)

    def rmdir(self, path: str) -> None:
        """There are no folders to remove."""

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        raise Refused(f"object stores cannot rename {path1} to {path2}")

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise Refused(f"nothing here should copy {path1} to {path2} to stand in for a rename")


def install(monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Makes every gs:// path of epath lead to a new, empty store, and returns it."""
    store = ObjectStore()
    store.objects, store.writes = {}, []
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: store)
    return store
