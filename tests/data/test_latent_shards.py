"""Latents on disk: what is written is what is read, and every fault is found and named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from nag_jax.data import latent_shards
from nag_jax.errors import UserError


def test_a_record_is_read_as_it_was_made(hand_made):
    records = hand_made.records(hand_made.encoding(5))
    layout = latent_shards.record_type((2, 2, 3))
    for index, record in enumerate(records):
        moments, label = latent_shards.parse_record(record.tobytes(), layout, index)
        np.testing.assert_array_equal(moments, record["moments"])
        assert moments.dtype == np.float16 and label == record["label"]


@pytest.mark.parametrize("place", [0, 8, 12, -5, -1])
def test_any_altered_byte_is_noticed(hand_made, place: int):
    content = bytearray(hand_made.records(hand_made.encoding(1))[0].tobytes())
    content[place] ^= 1
    with pytest.raises(ValueError, match="altered"):
        latent_shards.parse_record(bytes(content), latent_shards.record_type((2, 2, 3)), 0)


def test_a_record_in_anothers_place_or_of_another_size_is_noticed(hand_made):
    layout = latent_shards.record_type((2, 2, 3))
    content = hand_made.records(hand_made.encoding(4))[3].tobytes()
    with pytest.raises(ValueError, match="it is record 3"):
        latent_shards.parse_record(content, layout, 2)
    with pytest.raises(ValueError, match=f"{len(content) - 1} bytes instead of {len(content)}"):
        latent_shards.parse_record(content[1:], layout, 3)


def test_shards_cover_every_record_once(hand_made):
    encoding = hand_made.encoding(11, shard_records=4)
    assert encoding.num_shards == 3
    assert [index for shard in range(3) for index in encoding.shard_range(shard)] == list(range(11))


def test_totals_are_those_of_all_records(hand_made, tmp_path: Path):
    encoding = hand_made.encoding(11, shard_records=4)
    records = hand_made.records(encoding)
    hand_made.write(epath.Path(tmp_path), encoding, records)
    dataset = latent_shards.read_dataset(epath.Path(tmp_path))
    mean, log_variance = np.split(records["moments"].astype(np.float64).reshape(-1, 6), 2, axis=1)
    np.testing.assert_allclose(dataset.mean, mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, mean.std(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.mean_variance, np.exp(log_variance).mean(0), rtol=1e-12)
    assert dataset.class_counts == tuple(np.bincount(records["label"], minlength=3))
    assert [shard.count for shard in dataset.shards] == [4, 4, 3]
    assert dataset.encoding == encoding


def test_content_hashes_depend_on_the_content_alone(hand_made, tmp_path: Path):
    encoding = hand_made.encoding(8, shard_records=4)
    records = hand_made.records(encoding)
    first = hand_made.write(epath.Path(tmp_path / "a"), encoding, records)
    again = hand_made.write(epath.Path(tmp_path / "b"), encoding, records)
    assert first == again
    records["moments"][5, 1, 0, 0, 0] += 1
    altered = latent_shards.make_records(records["index"], records["label"], records["moments"])
    other = hand_made.write(epath.Path(tmp_path / "c"), encoding, altered)
    assert other.sha256 != first.sha256
    assert [a.sha256 == b.sha256 for a, b in zip(first.shards, other.shards, strict=True)] == [True, False]


def test_other_conditions_are_refused_by_name(hand_made, tmp_path: Path):
    encoding = hand_made.encoding(4)
    folder = epath.Path(tmp_path)
    latent_shards.begin(folder, encoding)
    latent_shards.begin(folder, encoding)
    assert latent_shards.read_encoding(folder) == encoding
    with pytest.raises(UserError, match=r"vae was 'made-up', is 'mse'; vae_fingerprint was 'f', is 'g'\."):
        latent_shards.begin(folder, dataclasses.replace(encoding, vae="mse", vae_fingerprint="g"))


def test_a_shard_of_other_conditions_is_refused(hand_made, tmp_path: Path):
    folder = epath.Path(tmp_path)
    encoding = hand_made.encoding(4)
    hand_made.write(folder, encoding, hand_made.records(encoding))
    with pytest.raises(UserError, match=r"00000-of-00001.json is of a shard made under other conditions"):
        latent_shards.unfinished_shards(folder, dataclasses.replace(encoding, vae_fingerprint="g"), range(1))


def test_an_unfinished_folder_names_what_is_missing(hand_made, tmp_path: Path):
    folder = epath.Path(tmp_path)
    encoding = hand_made.encoding(11, shard_records=2)
    with pytest.raises(UserError, match="there are no latents in"):
        latent_shards.read_dataset(folder)
    latent_shards.begin(folder, encoding)
    latent_shards.write_shard(folder, encoding, 1, hand_made.records(encoding)[2:4])
    message = "5 of 6 shards are missing: latents-00000-of-00006.array_record, .*00002-.* and 2 more"
    with pytest.raises(UserError, match=message):
        latent_shards.read_dataset(folder)
    with pytest.raises(UserError, match=message):
        latent_shards.finish(folder, encoding)
    assert latent_shards.unfinished_shards(folder, encoding, range(6)) == [0, 2, 3, 4, 5]


def test_missing_and_short_files_are_to_be_made_again(hand_made, tmp_path: Path):
    folder = epath.Path(tmp_path)
    encoding = hand_made.encoding(8, shard_records=2)
    dataset = hand_made.write(folder, encoding, hand_made.records(encoding))
    latent_shards.check_files(folder, dataset.shards)
    (tmp_path / encoding.shard_name(1)).unlink()
    short = tmp_path / encoding.shard_name(3)
    short.write_bytes(short.read_bytes()[:-1])
    assert latent_shards.unfinished_shards(folder, encoding, range(4)) == [1, 3]
    with pytest.raises(UserError, match=r"00001-of-00004.array_record is missing, .*00003-of-00004.* bytes instead of"):
        latent_shards.check_files(folder, dataset.shards)


def test_the_content_check_finds_an_altered_and_a_swapped_shard(hand_made, tmp_path: Path):
    folder = epath.Path(tmp_path)
    encoding = hand_made.encoding(6, shard_records=2)
    records = hand_made.records(encoding)
    hand_made.write(folder, encoding, records)
    files = [tmp_path / encoding.shard_name(shard) for shard in range(3)]
    altered = bytearray(files[0].read_bytes())
    altered[altered.find(records[1].tobytes()) + 20] ^= 1
    files[0].write_bytes(altered)
    files[1].write_bytes(files[2].read_bytes())
    for shard in (0, 1):
        remedy = f"altered or damaged .* Delete {encoding.manifest_name(shard)}"
        with pytest.raises(UserError, match=f"{encoding.shard_name(shard)} was {remedy}"):
            latent_shards.check_content(folder, encoding, shard)
    latent_shards.check_content(folder, encoding, 2)
