"""Weight files of the safetensors format (.safetensors) read as numpy arrays, without PyTorch.

Numbers of every common dtype are read, so that whoever expects another one can say which tensor is wrong and how.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from nag_jax.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads the tensors of a file.

    Returns:
        Arrays by name.

    Raises:
        UserError: the file is missing, cut short, damaged or of another format, or a dtype is unknown.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file. Give a .safetensors file.")
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is cut short, damaged or no safetensors file ({error}). Fetch it again.") from error
    tensors = {}
    for name, entry in entries:
        dtype, shape, numbers = DTYPES.get(entry["dtype"]), entry["shape"], entry["data"]
        if dtype is None or len(numbers) != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: tensor {name} has the dtype {entry['dtype']}, but float32 is expected.")
        tensors[name] = np.frombuffer(numbers, dtype).reshape(shape)
    return tensors
