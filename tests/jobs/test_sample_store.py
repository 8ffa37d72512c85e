"""Blocks of samples on disk: what is missing is known, whatever the blocks' sizes, and they are read in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nag_jax.errors import UserError
from nag_jax.jobs.sample_store import SampleStore


def test_an_empty_store_lacks_everything(tmp_path: Path):
    assert SampleStore(tmp_path / "none", 7).missing() == [range(7)]


@given(ends=st.lists(st.integers(1, 29), unique=True), dropped=st.sets(st.integers(0, 30)))
def test_what_is_missing_is_what_was_not_written(tmp_path_factory: pytest.TempPathFactory, ends, dropped):
    store = SampleStore(tmp_path_factory.mktemp("store"), 30)
    edges = [0, *sorted(ends), 30]
    written: set[int] = set()
    for number, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if number not in dropped:
            store.write(first, end - first, {"x": np.arange(first, end)})
            written |= set(range(first, end))
    missing = store.missing()
    assert {sample for samples in missing for sample in samples} == set(range(30)) - written
    assert all(before.stop < after.start for before, after in zip(missing[:-1], missing[1:], strict=True))
    for samples in missing:
        store.write(samples.start, len(samples), {"x": np.arange(samples.start, samples.stop)})
    np.testing.assert_array_equal(np.concatenate([block["x"] for block in store.read("x")]), np.arange(30))


def test_missing_and_damaged_blocks_are_named(tmp_path: Path):
    store = SampleStore(tmp_path, 10)
    store.write(0, 4, {"x": np.arange(4)})
    with pytest.raises(UserError, match="lacks samples 4 to 9"):
        list(store.read("x"))
    store.write(4, 6, {"x": np.arange(4, 10)})
    with pytest.raises(UserError, match="00000000-00000004.npz is damaged .*y is not a file.* Delete it"):
        list(store.read("x", "y"))
    file = tmp_path / "00000004-00000010.npz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="00000004-00000010.npz is damaged .* Delete it"):
        list(store.read("x"))


def test_blocks_of_two_runs_are_not_mixed(tmp_path: Path):
    store = SampleStore(tmp_path, 10)
    store.write(0, 6, {"x": np.arange(6)})
    store.write(4, 6, {"x": np.arange(4, 10)})
    with pytest.raises(UserError, match="00000004-00000010.npz overlaps .* Delete the folder"):
        list(store.read("x"))


def test_a_block_that_was_being_written_does_not_count(tmp_path: Path):
    (tmp_path / ".00000000-00000010.npz.partial").write_bytes(b"PK")
    assert SampleStore(tmp_path, 10).missing() == [range(10)]
