"""The order of the data is a function of (seed, step, row), whoever reads it."""

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from nag_jax.data import draws
from nag_jax.data.pipeline import eval_arrays, make_batches, ordered_batches
from nag_jax.data.sources import DataConfig, Source, open_source
from nag_jax.errors import UserError

Batch = dict[str, np.ndarray]


@pytest.fixture
def small(config: DataConfig) -> Source:
    return open_source(config, "train[:21]")


def first(batches: Iterator[Batch], count: int) -> list[Batch]:
    with closing(batches):  # type: ignore[type-var]
        return list(itertools.islice(batches, count))


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_batches_have_the_promised_types(train: Source, config: DataConfig):
    (batch,) = first(make_batches(train, config, batch_size=32, seed=0, start_step=0), 1)
    assert batch["image"].shape == (32, 8, 8, 1) and batch["image"].dtype == np.float32
    assert batch["image"].min() == -1 and batch["image"].max() == 1
    assert batch["label"].shape == (32,) and batch["label"].dtype == np.int32
    assert batch["index"].shape == (32,) and batch["index"].dtype == np.int64


def test_rows_are_the_records_that_index_names(train: Source, config: DataConfig):
    images, labels = eval_arrays(train, config)
    for batch in first(make_batches(train, config, batch_size=64, seed=1, start_step=7), 3):
        np.testing.assert_array_equal(batch["image"], images[batch["index"]])
        np.testing.assert_array_equal(batch["label"], labels[batch["index"]])


def test_each_epoch_visits_every_record_once_across_batch_borders(small: Source, config: DataConfig):
    batches = first(make_batches(small, config, batch_size=8, seed=0, start_step=0), 21)
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(8, 21)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(21))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_seed_changes_the_order(small: Source, config: DataConfig):
    orders = {
        tuple(first(make_batches(small, config, batch_size=21, seed=seed, start_step=0), 1)[0]["index"])
        for seed in range(4)
    }
    assert len(orders) == 4


def test_a_batch_may_hold_more_than_an_epoch(small: Source, config: DataConfig):
    (batch,) = first(make_batches(small, config, batch_size=50, seed=0, start_step=0), 1)
    np.testing.assert_array_equal(np.bincount(batch["index"][:42], minlength=21), np.full(21, 2))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_read_the_parts_of_one_batch(small: Source, config: DataConfig, process_count: int):
    config = dataclasses.replace(config, random_flip=True)
    keys: dict[str, Any] = {"batch_size": 8, "seed": 2, "start_step": 1}
    parts = [
        first(make_batches(small, config, **keys, process_index=p, process_count=process_count), 4)
        for p in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, first(make_batches(small, config, **keys), 4))


def test_starting_at_a_step_is_skipping_to_it(small: Source, config: DataConfig):
    config = dataclasses.replace(config, random_flip=True)
    whole = first(make_batches(small, config, batch_size=8, seed=0, start_step=0), 9)
    assert_same(first(make_batches(small, config, batch_size=8, seed=0, start_step=5), 4), whole[5:])


def test_far_steps_are_reached_at_once(small: Source, config: DataConfig):
    step = 10**9
    (batch,) = first(make_batches(small, config, batch_size=8, seed=0, start_step=step), 1)
    epoch, place = divmod(step * 8, 21)
    assert batch["index"][0] == draws.epoch_order(0, epoch, 21)[place]


def test_mirroring_follows_seed_epoch_and_record(small: Source, config: DataConfig):
    config = dataclasses.replace(config, random_flip=True)
    images, _ = eval_arrays(small, config)
    mirrored = 0
    for epoch, batch in enumerate(first(make_batches(small, config, batch_size=21, seed=6, start_step=0), 4)):
        for image, record in zip(batch["image"], batch["index"], strict=True):
            expected = images[record][:, ::-1] if draws.flip(6, epoch, int(record)) else images[record]
            np.testing.assert_array_equal(image, expected)
            mirrored += draws.flip(6, epoch, int(record))
    assert 0 < mirrored < 4 * 21


def test_batch_that_cannot_be_shared_names_sizes_that_can(small: Source, config: DataConfig):
    with pytest.raises(UserError, match=r"batch of 10 .* = 4.* 8 or 12"):
        make_batches(small, config, batch_size=10, seed=0, start_step=0, process_count=4)
    with pytest.raises(UserError, match="such as 4"):
        make_batches(small, config, batch_size=3, seed=0, start_step=0, process_count=4)
    with pytest.raises(UserError, match="batch of 0"):
        make_batches(small, config, batch_size=0, seed=0, start_step=0)


def test_negative_seed_is_refused(small: Source, config: DataConfig):
    with pytest.raises(UserError, match="seed is -1"):
        make_batches(small, config, batch_size=3, seed=-1, start_step=0)


def test_ordered_batches_give_every_record_once_in_order(small: Source, config: DataConfig):
    batches = list(ordered_batches(small, config, batch_size=8))
    assert [len(batch["index"]) for batch in batches] == [8, 8, 5]
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in batches]), np.arange(21))
    limited = list(ordered_batches(small, config, batch_size=8, limit=10))
    np.testing.assert_array_equal(np.concatenate([batch["index"] for batch in limited]), np.arange(10))


def test_eval_arrays_hold_the_first_records(small: Source, config: DataConfig):
    images, labels = eval_arrays(small, config)
    assert images.shape == (21, 8, 8, 1) and images.dtype == np.float32 and labels.dtype == np.int32
    few, few_labels = eval_arrays(small, config, limit=5)
    np.testing.assert_array_equal(few, images[:5])
    np.testing.assert_array_equal(few_labels, labels[:5])
    np.testing.assert_array_equal(labels, [small[i]["label"] for i in range(21)])


def test_a_damaged_record_stops_the_iteration_with_its_name(small: Source, config: DataConfig):
    broken = [{"image": b"no image", "label": 0}] * 21
    damaged = dataclasses.replace(small, records=broken, decoded=None)
    with pytest.raises(UserError, match=r"record \d+ of data set 'digits'"):
        first(make_batches(damaged, config, batch_size=4, seed=0, start_step=0), 1)
