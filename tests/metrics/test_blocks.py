"""Blocks of rows: their size, their filling, and that rows arrive as they are."""

import numpy as np
import pytest

from nag_jax.metrics.blocks import block_size, fill_up, num_parts, split_rows
from nag_jax.parallel import ParallelConfig, make_mesh


class EightParts:
    """Stands in for a mesh of 4 x 2 x 3 devices where only the sizes of its axes matter."""

    shape = {"data": 4, "fsdp": 2, "tensor": 3}


@pytest.mark.parametrize(
    ("num_rows", "largest", "one", "eight"),
    [(100, 4096, 100, 104), (5000, 4096, 4096, 4096), (3, 4096, 3, 8), (100, 30, 30, 24)],
)
def test_sizes_divide_and_stay_below_the_largest(num_rows, largest, one, eight):
    assert num_parts(None) == 1 and num_parts(EightParts) == 8
    assert block_size(num_rows, largest, None) == one
    assert block_size(num_rows, largest, EightParts) == eight


def test_filling_adds_zeros_behind():
    rows = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    np.testing.assert_array_equal(fill_up(rows, 5), [[1, 2], [3, 4], [5, 6], [0, 0], [0, 0]])
    assert fill_up(rows, 3) is rows


@pytest.mark.parametrize("mesh", [None, make_mesh(ParallelConfig())])
def test_rows_arrive_unchanged(mesh):
    rows = np.arange(8, dtype=np.int32).reshape(4, 2)
    placed = split_rows(rows, mesh)
    assert placed.dtype == rows.dtype
    np.testing.assert_array_equal(placed, rows)
