"""Small files: whole or not at all, readable JSON, clear errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from nag_jax import storage
from nag_jax.errors import NagJaxError, UserError


def test_json_holds_numpy_values_and_no_nan(tmp_path: Path):
    storage.write_json(tmp_path / "a" / "x.json", {"n": np.float32(0.5), "a": np.arange(3), "t": (1, float("nan"))})
    assert storage.read_json(tmp_path / "a" / "x.json") == {"n": 0.5, "a": [0, 1, 2], "t": [1, None]}


def test_writing_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path):
    for content in (b"old" * 100, b"new"):
        storage.write_bytes(tmp_path / "x", content)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"new"


def test_a_failed_write_keeps_the_old_file_and_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.json"
    storage.write_json(path, {"old": 1})

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    monkeypatch.setattr(os, "rename", full_disk)
    monkeypatch.setattr(Path, "replace", full_disk)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(NagJaxError, match="x.json: No space left on device"):
        storage.write_json(path, {"new": 2})
    monkeypatch.undo()
    assert storage.read_json(path) == {"old": 1}


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="none.json does not exist"):
        storage.read_json(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(UserError, match="cut.json is damaged"):
        storage.read_json(tmp_path / "cut.json")


def test_an_object_is_sent_when_it_is_complete_and_never_before(object_store: Any):
    path = "gs://bucket/run/x"
    storage.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), storage.whole_file(path) as file:
        file.write(b"half of the n")
        raise ZeroDivisionError
    assert object_store.objects == {"bucket/run/x": b"old"}
    storage.write_bytes(path, b"new")
    assert object_store.objects == {"bucket/run/x": b"new"}


def test_a_file_larger_than_memory_is_sent_whole(object_store: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "LARGEST_IN_MEMORY", 10)
    with storage.whole_file("gs://bucket/x") as file:
        for number in range(7):
            file.write(bytes([number]) * 9)
    assert object_store.objects["bucket/x"] == b"".join(bytes([number]) * 9 for number in range(7))


def test_a_growing_object_is_what_was_written_up_to_its_last_flush(object_store: Any):
    growing = storage.GrowingObject("gs://bucket/x", b"a")
    growing.write(b"b")
    growing.flush()
    growing.write(b"c")
    assert object_store.objects["bucket/x"] == b"ab"
    growing.close()
    assert object_store.objects["bucket/x"] == b"abc"


def test_only_addresses_with_a_scheme_are_object_stores(tmp_path: Path):
    assert storage.is_object_store("gs://bucket/x") and storage.is_object_store(epath.Path("gs://bucket") / "x")
    assert not storage.is_object_store(tmp_path) and not storage.is_object_store("runs/x")
