"""Safetensors files: every number as it was written, and each way to be damaged told apart from a traceback."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from nag_jax.convert import safetensors_file
from nag_jax.errors import UserError


def written(path: Path, dtype: str, shape: list[int], size: int) -> Path:
    """A file with one tensor "x" of `size` zero bytes, whatever its header says of it."""
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return path


def test_what_is_written_is_read(tmp_path: Path):
    tensors = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "whole": np.arange(3),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = safetensors_file.state_dict(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_bfloat16_is_read_as_such(tmp_path: Path):
    found = safetensors_file.state_dict(written(tmp_path / "w.safetensors", "BF16", [2, 2], 8))
    assert found["x"].dtype == ml_dtypes.bfloat16 and found["x"].shape == (2, 2)


def test_an_unknown_dtype_names_its_tensor(tmp_path: Path):
    with pytest.raises(UserError, match="tensor x has the dtype C64, but float32 is expected"):
        safetensors_file.state_dict(written(tmp_path / "w.safetensors", "C64", [2], 16))


def test_a_damaged_file_is_refused(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    whole = written(path, "F32", [4, 4], 64).read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-1], whole + b"0", b"PK\x03\x04" + whole, b"{}" * 40):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cut short, damaged or no safetensors file"):
            safetensors_file.state_dict(path)
    with pytest.raises(UserError, match="cut short, damaged or no safetensors file"):
        safetensors_file.state_dict(written(path, "F32", [5, 4], 64))
    with pytest.raises(UserError, match="is no file"):
        safetensors_file.state_dict(tmp_path / "missing.safetensors")
