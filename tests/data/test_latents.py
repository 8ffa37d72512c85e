"""The reader of latents: every record as it was written, and faults named."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from nag_jax.autoencoder import made_up_autoencoder
from nag_jax.data import draws, latent_shards
from nag_jax.data.latents import LatentSource, open_latents, sample_states
from nag_jax.data.pipeline import eval_arrays, make_batches, ordered_batches
from nag_jax.data.sources import DataConfig
from nag_jax.errors import UserError

SPLIT = "train[:9%]"


@pytest.fixture
def written(hand_made, tmp_path: Path) -> tuple[DataConfig, np.ndarray]:
    """A folder of 11 latents in 3 shards, as a config names it, and its records."""
    config = DataConfig(name="squares", split=SPLIT, latents=str(tmp_path))
    encoding = hand_made.encoding(11)
    records = hand_made.records(encoding)
    hand_made.write(latent_shards.split_folder(config, SPLIT), encoding, records)
    return config, records


def shard_files(config: DataConfig) -> list[Path]:
    return sorted(Path(config.latents).glob("*/*.array_record"))


def test_records_are_read_as_written_in_any_order(written):
    config, records = written
    source = open_latents(config, SPLIT)
    assert len(source) == 11 and source.image_shape == (2, 2, 3) and source.num_classes == 3
    assert (source.latent.scaling_factor, source.latent.downsampling, source.latent.encoder_hash) == (0.5, 4, "e")
    for one in (source, pickle.loads(pickle.dumps(source))):
        for index in (10, 0, 4, 3, 7):
            np.testing.assert_array_equal(one[index]["moments"], records["moments"][index])
            assert one[index]["label"] == records["label"][index]
    for index in (-1, 11):
        with pytest.raises(IndexError):
            source[index]


def test_the_fingerprint_follows_the_content(hand_made, written, tmp_path: Path):
    config, records = written
    other = dataclasses.replace(config, latents=str(tmp_path / "other"))
    records = latent_shards.make_records(records["index"], records["label"], -records["moments"])
    hand_made.write(latent_shards.split_folder(other, SPLIT), hand_made.encoding(11), records)
    assert open_latents(config, SPLIT).fingerprint == open_latents(config, SPLIT).fingerprint
    assert open_latents(config, SPLIT).fingerprint != open_latents(other, SPLIT).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": ""}, "data.latents is not set"),
        ({"latents": "/nowhere"}, "there are no latents in /nowhere"),
        ({"name": "circles"}, "data is 'squares' there and 'circles' here"),
        ({"image_size": 16}, "image_size is 8 there and 16 here"),
        ({"channels": 3}, "channels is 1 there and 3 here"),
    ],
)
def test_latents_of_something_else_are_refused(written, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        open_latents(dataclasses.replace(written[0], **changes), SPLIT)


def test_splits_with_like_folders_are_told_apart(written):
    assert latent_shards.split_folder(written[0], SPLIT) == latent_shards.split_folder(written[0], "train[_9%]")
    with pytest.raises(UserError, match=r"split is 'train\[:9%\]' there and 'train\[_9%\]' here"):
        open_latents(written[0], "train[_9%]")


def test_missing_and_short_shards_are_named_at_opening(written):
    files = shard_files(written[0])
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(UserError, match="00000-of-00003.array_record has .* bytes instead of .* --mode=encode"):
        open_latents(written[0], SPLIT)
    files[2].unlink()
    with pytest.raises(UserError, match="00000-of-00003.*00002-of-00003.array_record is missing"):
        open_latents(written[0], SPLIT)


def test_an_unfinished_folder_is_refused(written):
    files = shard_files(written[0])
    (files[0].parent / "dataset.json").unlink()
    files[1].with_suffix(".json").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing: latents-00001-of-00003.array_record"):
        open_latents(written[0], SPLIT)


def test_a_swapped_and_an_altered_shard_are_named_on_reading(written):
    config, records = written
    files = shard_files(config)
    files[0].write_bytes(files[1].read_bytes())
    altered = bytearray(files[2].read_bytes())
    altered[altered.find(records[9].tobytes()) + 30] ^= 1
    files[2].write_bytes(altered)
    source = open_latents(config, SPLIT)
    with pytest.raises(UserError, match=r"record 2 in .*00000-of-00003.array_record cannot be used \(it is record 6\)"):
        source[2]
    with pytest.raises(UserError, match="record 9 in .*00002-of-00003.array_record cannot be used"):
        source[9]
    np.testing.assert_array_equal(source[6]["moments"], records["moments"][6])


def test_states_are_scaled_gaussians_keyed_by_row():
    mean = np.linspace(-3, 3, 4, dtype=np.float32) * np.ones((2, 40, 40, 4), np.float32)
    log_variance = np.linspace(-4, 1, 4, dtype=np.float32) * np.ones_like(mean)
    moments = np.concatenate([mean, log_variance], axis=-1).astype(np.float16)
    keys = jax.random.split(jax.random.key(0), 2)
    states = np.asarray(jax.jit(sample_states, static_argnums=2)(moments, keys, 0.5))
    assert states.shape == (2, 40, 40, 4) and states.dtype == np.float32
    deviations = (states / 0.5 - mean) / np.exp(0.5 * log_variance)
    # 12800 standard normal values: four standard errors.
    assert abs(deviations.mean()) < 4 / 12800**0.5 and abs(deviations.std() - 1) < 4 / (2 * 12800) ** 0.5
    assert abs(np.corrcoef(deviations.reshape(2, -1))[0, 1]) < 4 / 6400**0.5
    alone = sample_states(moments[1:], keys[1:], 0.5)
    np.testing.assert_allclose(alone[0], states[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("random_flip", [False, True])
def test_batches_hold_the_orientation_that_the_coin_says(written, random_flip: bool):
    config, records = written
    config = dataclasses.replace(config, random_flip=random_flip)
    source = open_latents(config, SPLIT)
    orientations = set()
    with closing(make_batches(source, config, batch_size=11, seed=3, start_step=2)) as batches:
        for epoch, batch in zip(range(2, 5), batches, strict=False):
            assert sorted(batch["index"]) == list(range(11)) and set(batch) == {"moments", "label", "index"}
            assert batch["moments"].dtype == np.float16 and batch["label"].dtype == np.int32
            for moments, label, index in zip(batch["moments"], batch["label"], batch["index"], strict=True):
                mirrored = random_flip and draws.flip(3, epoch, int(index))
                orientations.add(mirrored)
                np.testing.assert_array_equal(moments, records["moments"][index, int(mirrored)])
                assert label == records["label"][index]
    assert orientations == {False, random_flip}


def test_held_out_states_depend_on_their_record_alone(written):
    config, records = written
    source = open_latents(config, SPLIT)
    states, labels = eval_arrays(source, config)
    assert states.shape == (11, 2, 2, 3) and states.dtype == np.float32
    np.testing.assert_array_equal(labels, records["label"])
    few, few_labels = eval_arrays(source, config, limit=5)
    np.testing.assert_allclose(few, states[:5], rtol=1e-6)
    np.testing.assert_array_equal(few_labels, labels[:5])
    mean, log_variance = np.split(records["moments"][:, 0].astype(np.float32), 2, axis=-1)
    noise = (states / 0.5 - mean) / np.exp(0.5 * log_variance)
    assert len(np.unique(noise.round(4))) == noise.size and 0.7 < noise.std() < 1.3


def test_held_out_states_without_variance_are_the_scaled_means(hand_made, tmp_path: Path):
    config = DataConfig(name="squares", split=SPLIT, latents=str(tmp_path))
    encoding = hand_made.encoding(11)
    made = hand_made.records(encoding)
    moments = made["moments"].copy()
    moments[..., 3:] = -30.0
    records = latent_shards.make_records(made["index"], made["label"], moments)
    hand_made.write(latent_shards.split_folder(config, SPLIT), encoding, records)
    states, _ = eval_arrays(open_latents(config, SPLIT), config)
    np.testing.assert_allclose(states, 0.5 * records["moments"][:, 0, ..., :3].astype(np.float32), atol=1e-6)


def test_ordered_batches_of_latents(written):
    config, records = written
    batches = list(ordered_batches(open_latents(config, SPLIT), config, batch_size=4))
    assert [len(batch["index"]) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([b["moments"] for b in batches]), records["moments"][:, 0])


def test_made_up_latents_need_no_files(data_dir: Path):
    config = DataConfig(data_dir=str(data_dir), image_size=32, mock_examples=6, latents="unused")
    source = open_latents(config, "train")
    assert len(source) == 6 and source.num_classes == 10 and source.image_shape == (4, 4, 4)
    assert source.latent == made_up_autoencoder().latent
    states, labels = eval_arrays(source, config)
    assert states.shape == (6, 4, 4, 4) and 0.7 < states.std() < 1.3 and labels.max() < 10
    again, _ = eval_arrays(open_latents(config, "train"), config)
    np.testing.assert_array_equal(again, states)
    with pytest.raises(UserError, match="image_size = 30 must be a multiple of 8"):
        open_latents(dataclasses.replace(config, image_size=30), "train")


def test_many_shards_open_and_read_quickly(hand_made, tmp_path: Path):
    config = DataConfig(name="squares", split=SPLIT, latents=str(tmp_path))
    encoding = hand_made.encoding(150, shard_records=1)
    hand_made.write(latent_shards.split_folder(config, SPLIT), encoding, hand_made.records(encoding))
    start = time.perf_counter()
    source: LatentSource = open_latents(config, SPLIT)
    assert time.perf_counter() - start < 2
    assert [source[index]["moments"].shape for index in itertools.chain([149], range(2))] == [(2, 2, 2, 6)] * 3
