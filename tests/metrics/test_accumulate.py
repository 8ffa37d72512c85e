"""Streaming moments equal numpy's for any split, padding, order of merging and mesh."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nag_jax.errors import UserError
from nag_jax.metrics.accumulate import add_block, merge, moments_in_blocks, start
from nag_jax.metrics.frechet import frechet_distance, moments


def some_features(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    """Correlated, far from the origin and of different scales, as features are."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(n, d)) @ rng.normal(size=(d, d)) * np.logspace(-2, 1, d) + 10.0
    return x.astype(np.float32)


def assert_within_the_stated_bound(state, features, block_rows):
    exact = features.astype(np.float64)
    assert state.count == len(features)
    about_shift = ((exact - state.shift) ** 2).mean(axis=0)
    # The bound is one for sums over N; the covariance divides by N - 1.
    allowed = (block_rows + 8) * 2.0**-22 * np.sqrt(np.outer(about_shift, about_shift)) * 2.0
    assert (np.abs(state.moments().covariance - np.cov(exact, rowvar=False)) <= allowed).all()
    np.testing.assert_allclose(
        state.mean, exact.mean(axis=0), atol=(block_rows + 8) * 2.0**-23 * np.sqrt(about_shift.max()), rtol=1e-12
    )


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 16), min_size=2, max_size=6), seed=st.integers(0, 100))
def test_any_split_and_padding_is_numpys_covariance(sizes, seed):
    x = some_features(sum(sizes), seed=seed)
    state, begin = start(x[:2].mean(axis=0)), 0
    for size in sizes:
        rng = np.random.default_rng(begin)
        block = np.full((16, x.shape[1]), np.nan, np.float32)
        places = np.sort(rng.choice(16, size, replace=False))
        block[places] = x[begin : begin + size]
        state = add_block(state, block, np.isin(np.arange(16), places))
        begin += size
    assert_within_the_stated_bound(state, x, 16)


@pytest.mark.parametrize("block_rows", [1, 7, 64, 300, 4096])
def test_features_in_memory(block_rows):
    x = some_features(300)
    assert_within_the_stated_bound(moments_in_blocks(x, block_rows=block_rows), x, block_rows)


def test_a_distance_from_streamed_moments_is_the_distance():
    x, y = some_features(900, seed=1), some_features(800, seed=2)
    streamed = [moments_in_blocks(part, block_rows=128).moments() for part in (x, y)]
    assert frechet_distance(*streamed) == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-4)


def test_merging_is_the_union_in_any_grouping_and_about_any_shift():
    x = some_features(90)
    a, b, c = (moments_in_blocks(part) for part in (x[:10], x[10:11], x[11:]))
    whole = moments_in_blocks(x)
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        assert merged.count == 90
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-6)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-4, atol=1e-4 * np.abs(whole.scatter).max())
    empty = start(np.zeros(12))
    np.testing.assert_allclose(merge(empty, a).scatter, a.scatter, rtol=1e-12)
    np.testing.assert_allclose(merge(a, empty).mean, a.mean, rtol=1e-12)


def test_a_far_offset_is_no_trouble_about_a_near_shift():
    x = (np.random.default_rng(0).normal(size=(500, 3)) + 1e4).astype(np.float32)
    np.testing.assert_allclose(
        moments_in_blocks(x).moments().covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-5
    )


def test_constant_features_have_no_variance():
    state = moments_in_blocks(np.full((50, 4), 0.1, np.float32), block_rows=16)
    np.testing.assert_array_equal(state.moments().covariance, 0.0)
    np.testing.assert_allclose(state.mean, np.float32(0.1), rtol=1e-7)


def test_errors_name_what_is_wrong():
    state = start(np.zeros(3))
    good = np.zeros((4, 3), np.float32)
    with pytest.raises(UserError, match=r"\[4, 2\].*expected \[rows, 3\]"):
        add_block(state, good[:, :2], np.ones(4, bool))
    with pytest.raises(UserError, match="1 to 4096"):
        add_block(state, np.zeros((4097, 3), np.float32), np.ones(4097, bool))
    with pytest.raises(UserError, match="valid rows"):
        add_block(state, good, np.ones(3, bool))
    for value in (np.nan, np.inf, 1e25):
        bad = good.copy()
        bad[2, 1] = value
        with pytest.raises(UserError, match="after the first 0 contain NaN"):
            add_block(state, bad, np.ones(4, bool))
        assert add_block(state, bad, np.arange(4) != 2).count == 3
    with pytest.raises(UserError, match="at least 2"):
        moments_in_blocks(good[:1]).moments()
    with pytest.raises(UserError, match="N at least 1"):
        moments_in_blocks(good[:0])
    with pytest.raises(UserError, match="2 and 3 dimensions"):
        merge(start(np.zeros(2)), state)
    with pytest.raises(UserError, match="shift"):
        start([np.nan])


@pytest.mark.serial
def test_eight_devices_compute_what_one_does(on_eight_devices):
    report = on_eight_devices(Path(__file__).with_name("eight_devices.py"))
    assert report["devices"] == 8
    assert report["rows_are_split"]
    assert all(report["moments_within_bound"].values()), report
    assert "12 examples does not split evenly" in report["refused"]
    assert report["manifold_equals_one_device"] == {"data": True, "all": True}
