"""The content hash of a tree of parameters, by which files and results say which network they belong to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np


def params_hash(params: Any) -> str:
    """SHA-256 (hex) of a tree of arrays: every leaf's path, dtype, shape and bytes, by sorted path."""
    leaves = sorted((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params))
    digest = hashlib.sha256()
    for path, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(json.dumps([path, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
