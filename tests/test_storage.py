"""Small files: whole or not at all, readable JSON, clear errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

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
