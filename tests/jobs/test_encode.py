"""Encoding: the latents are those of the images, whatever was interrupted and however many hosts there were."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from nag_jax.autoencoder import Autoencoder, made_up_autoencoder, make_autoencoder, write_autoencoder
from nag_jax.config import Config
from nag_jax.data import latent_shards
from nag_jax.data.images import preprocess, to_float
from nag_jax.data.latents import open_latents
from nag_jax.data.pipeline import eval_arrays
from nag_jax.data.sources import DataConfig, Source, open_source, prepare_digits
from nag_jax.errors import UserError
from nag_jax.jobs import encode
from nag_jax.jobs.encode import Work, encode_shards
from nag_jax.jobs.interrupt import Stopped, StopRequest
from nag_jax.models.vae import VaeConfig

TINY = VaeConfig(channels=1, latent_channels=2, block_out_channels=(4, 4), layers_per_block=1, norm_groups=2)
CONFIG = DataConfig(name="squares", image_size=8)
NEVER = StopRequest()


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return encode.on_local_devices(made_up_autoencoder(TINY))


@pytest.fixture(scope="module")
def source() -> Source:
    """52 grey images of many sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(6, 30, (52, 2))
    records = [{"image": rng.integers(0, 256, (*size, 1), np.uint8), "label": i % 3} for i, size in enumerate(sizes)]
    return Source("squares", "train", 3, (8, 8, 1), "squares 1.0.0 train 52", records)


@pytest.fixture(scope="module")
def make_work(vae: Autoencoder, source: Source) -> Callable[[Path], Work]:
    """Begins a folder of 52 latents in 4 shards, the last with 4 of them."""

    def begin(folder: Path) -> Work:
        encoding = dataclasses.replace(encode.make_encoding(CONFIG, source, vae), shard_records=16)
        work = Work(source, encoding, epath.Path(folder))
        latent_shards.begin(work.folder, encoding)
        return work

    return begin


@pytest.fixture(scope="module")
def whole(make_work, vae: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one host made without a stop."""
    work = make_work(tmp_path_factory.mktemp("whole") / "train")
    encode_shards(work, CONFIG, vae, NEVER)
    latent_shards.finish(work.folder, work.encoding)
    return Path(work.folder)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder of latents, but for the one that says which command made them."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "environment.json"}


def finish(work: Work) -> dict[str, bytes]:
    latent_shards.finish(work.folder, work.encoding)
    return content(Path(work.folder))


def test_latents_are_those_of_the_cropped_image_and_of_its_mirror_image(whole: Path, vae: Autoencoder, source: Source):
    latents = open_latents(dataclasses.replace(CONFIG, latents=str(whole.parent)), "train")
    assert len(latents) == len(source) and latents.latent == vae.latent
    assert latents.image_shape == (4, 4, 2) and latents.num_classes == 3
    images = to_float(np.stack([preprocess(source[i]["image"], 8, 1) for i in range(len(source))]))
    for orientation, oriented in enumerate([images, images[:, :, ::-1]]):
        expected = np.concatenate(vae.encode(oriented), axis=-1)
        stored = np.stack([latents[i]["moments"][orientation] for i in range(len(source))])
        np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-3)
    assert [latents[i]["label"] for i in range(len(source))] == [i % 3 for i in range(len(source))]
    # The padding of strided convolutions is not symmetric, so a mirrored latent is not the mirror image's.
    assert np.abs(latents[0]["moments"][1] - latents[0]["moments"][0][:, ::-1]).max() > 0.05


@pytest.mark.parametrize("batches_before", [0, 1, 3, 5])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_stop_loses_at_most_a_shard_and_leaves_no_trace(
    make_work, vae: Autoencoder, whole: Path, tmp_path: Path, monkeypatch, batches_before: int, how: str
):
    work, stop, encoded = make_work(tmp_path / "train"), StopRequest(), 0
    original = encode.encode_batch

    def encode_some(*arguments):
        nonlocal encoded
        if encoded == batches_before:
            if how == "kill":
                raise KeyboardInterrupt
            stop.signal = signal.SIGTERM
        encoded += 1
        return original(*arguments)

    monkeypatch.setattr(encode, "encode_batch", encode_some)
    with pytest.raises(Stopped if how == "signal" else KeyboardInterrupt) as stopped:
        encode_shards(work, CONFIG, vae, stop)
    monkeypatch.undo()
    if how == "signal":
        assert stopped.value.exit_code == 128 + signal.SIGTERM and "of 4 shards are finished" in str(stopped.value)
    # Two batches of 8 are a shard.
    finished = (encoded if how == "signal" else batches_before) // 2
    files = sorted((tmp_path / "train").glob("latents-*"))
    assert len(files) == 2 * finished
    times = [file.stat().st_mtime_ns for file in files]
    with pytest.raises(UserError, match=f"{4 - finished} of 4 shards are missing"):
        open_latents(dataclasses.replace(CONFIG, latents=str(tmp_path)), "train")
    encode_shards(work, CONFIG, vae, NEVER)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert finish(work) == content(whole)


def test_several_hosts_make_disjoint_shards_of_the_same_whole(make_work, vae: Autoencoder, whole: Path, tmp_path: Path):
    work = make_work(tmp_path / "train")
    made: list[set[str]] = []
    for host in (2, 0, 1):
        before = set(content(tmp_path / "train"))
        encode_shards(work, CONFIG, vae, NEVER, host, 3)
        made.append(set(content(tmp_path / "train")) - before)
    names = [{name(shard) for name in (work.encoding.shard_name, work.encoding.manifest_name)} for shard in range(4)]
    assert made == [names[2], names[0] | names[3], names[1]]
    assert finish(work) == content(whole)


def test_a_finished_folder_is_checked_and_stays(make_work, vae: Autoencoder, whole: Path):
    before = {file: file.stat().st_mtime_ns for file in whole.glob("latents-*")}
    assert "all 4 shards were there and have the right content" in encode_shards(make_work(whole), CONFIG, vae, NEVER)
    assert {file: file.stat().st_mtime_ns for file in whole.glob("latents-*")} == before


def test_faulty_shards_are_found_and_made_again(make_work, vae: Autoencoder, whole: Path, tmp_path: Path):
    work = make_work(tmp_path / "train")
    for name, file in content(whole).items():
        (tmp_path / "train" / name).write_bytes(file)
    shards = [tmp_path / "train" / work.encoding.shard_name(shard) for shard in range(4)]
    altered = bytearray(shards[1].read_bytes())
    record = open_latents(dataclasses.replace(CONFIG, latents=str(whole.parent)), "train").records[17]
    altered[altered.find(record) + 50] ^= 1
    shards[1].write_bytes(altered)
    shards[2].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:-1])
    message = r"00001-of-00004.array_record was altered .* Delete latents-00001-of-00004.json"
    with pytest.raises(UserError, match=message):
        encode_shards(work, CONFIG, vae, NEVER)
    shards[1].with_suffix(".json").unlink()
    assert "3 of 4 shards encoded" in encode_shards(work, CONFIG, vae, NEVER)
    assert finish(work) == content(whole)


def with_quant_bias(vae: Autoencoder, bias: float) -> Autoencoder:
    params = jax.tree.map(np.asarray, vae.params)
    params["quant_conv"] = params["quant_conv"] | {"bias": params["quant_conv"]["bias"] + np.float32(bias)}
    return make_autoencoder("shifted", vae.description.config, params)


def test_latents_that_float16_cannot_hold_are_refused(make_work, vae: Autoencoder, tmp_path: Path):
    work = make_work(tmp_path / "train")
    with pytest.raises(UserError, match="Record 0 of squares 1.0.0 .* has latents that float16 cannot hold: .*1e.05"):
        encode_shards(work, CONFIG, with_quant_bias(vae, 1e5), NEVER)
    with pytest.raises(UserError, match="Record 0 .* float16 cannot hold: moments between nan"):
        encode_shards(work, CONFIG, with_quant_bias(vae, np.nan), NEVER)
    assert not list((tmp_path / "train").glob("latents-*"))


def test_a_record_without_a_label_is_refused(make_work, vae: Autoencoder, source: Source, tmp_path: Path):
    records = [*source.records[:20], {**source.records[20], "label": -1}, *source.records[21:]]
    work = dataclasses.replace(make_work(tmp_path), source=dataclasses.replace(source, records=records))
    with pytest.raises(UserError, match="Record 20 of .* has the label -1, not one of 0 ... 2"):
        encode_shards(work, CONFIG, vae, NEVER)


@pytest.fixture(scope="module")
def digits(vae: Autoencoder, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The digits and an autoencoder for them, with splits that encode quickly."""
    folder = tmp_path_factory.mktemp("digits")
    prepare_digits(folder / "data")
    write_autoencoder(folder / "vae", vae)
    data = DataConfig(data_dir=str(folder / "data"), split="train[:20]", eval_split="test[:5]", vae=str(folder / "vae"))
    return Config(data=data)


def with_data(config: Config, **changes: str | int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_both_splits_are_encoded_and_other_autoencoders_refused(
    digits: Config, vae: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = with_data(digits, latents=str(tmp_path / "latents"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    # A record is 16 bytes and 2 orientations x 4 x 4 x 4 moments of 2 bytes.
    assert "20 records of shape (4, 4, 2), 5.44e-06 GB in 1 shards, 0 of them done" in encode.describe(config)
    assert not (tmp_path / "latents").exists()
    assert encode.run(config) == config.data.latents
    assert "in 1 shards, 1 of them done" in encode.describe(config)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    assert encode.run(config) == config.data.latents, "other flags are no other latents"
    for split in (config.data.split, config.data.eval_split):
        folder = latent_shards.split_folder(config.data, split)
        flags = json.loads((folder / "environment.json").read_text())["compiler_flags"]
        assert flags["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5", "those of the run that made them"
    for split, count in (("train[:20]", 20), ("test[:5]", 5)):
        source = open_source(config.data, split)
        latents = open_latents(config.data, split)
        assert len(latents) == count and latents.fingerprint.startswith(source.fingerprint)
        images, labels = eval_arrays(source, config.data)
        expected = np.concatenate(vae.encode(images), axis=-1)
        for index in range(count):
            np.testing.assert_allclose(latents[index]["moments"][0], expected[index], rtol=2e-3, atol=2e-3)
            assert latents[index]["label"] == labels[index]
    write_autoencoder(tmp_path / "other", with_quant_bias(vae, 0.1))
    with pytest.raises(UserError, match="vae was 'made-up', is 'shifted'; vae_fingerprint was .*; latent was"):
        encode.run(with_data(config, vae=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": ""}, "Set --config.data.vae=FOLDER"),
        ({"latents": ""}, "Set --config.data.latents=FOLDER"),
        ({"vae": "/nowhere"}, "/nowhere holds no autoencoder"),
        ({"channels": 3}, "takes images of 1 channels .* data.channels = 3"),
        ({"image_size": 9}, "a side that is a multiple of 2, but .* data.image_size = 9"),
        ({"split": "train[:5]", "eval_split": "train[5:"}, "train"),
    ],
)
def test_what_cannot_be_encoded_is_said_before_anything_runs(digits: Config, tmp_path: Path, changes, message: str):
    config = with_data(digits, **{"latents": str(tmp_path / "latents"), **changes})
    for job in (encode.run, encode.describe):
        with pytest.raises(UserError, match=message):
            job(config)
    assert not (tmp_path / "latents").exists()


def test_splits_whose_names_differ_in_special_characters_alone_are_refused(
    vae: Autoencoder, source: Source, monkeypatch
):
    monkeypatch.setattr(encode, "open_source", lambda config, split: source)
    config = dataclasses.replace(CONFIG, split="a b", eval_split="a_b", latents="/nowhere")
    with pytest.raises(UserError, match="'a b' and 'a_b' have the same folder /nowhere/a_b"):
        encode.open_works(config, vae)


def arguments(config: Config, latents: Path, *changes: str) -> list[str]:
    data = config.data
    keys = {"data_dir": data.data_dir, "vae": data.vae, "latents": latents}
    return ["--mode=encode", *(f"--config.data.{key}={value}" for key, value in keys.items()), *changes]


@pytest.mark.serial
def test_the_command_goes_on_after_kill_9(runs, digits: Config, tmp_path: Path):
    splits = "--config.data.eval_split=train[1:]+test"
    first = tmp_path / "killed" / "train" / "latents-00000-of-00001.json"
    runs.interrupt(None, signal.SIGKILL, first.exists, *arguments(digits, tmp_path / "killed", splits))
    shard = first.with_suffix(".array_record")
    time = shard.stat().st_mtime_ns
    assert not (tmp_path / "killed" / "train_1__+test" / "dataset.json").exists()
    output, errors = runs.finish(None, *arguments(digits, tmp_path / "killed", splits))
    assert output.splitlines()[-1] == f"written: {tmp_path / 'killed'}"
    assert "train: all 1 shards were there and have the right content" in errors
    assert shard.stat().st_mtime_ns == time
    runs.finish(None, *arguments(digits, tmp_path / "whole", splits))
    for split in ("train", "train_1__+test"):
        assert content(tmp_path / "killed" / split) == content(tmp_path / "whole" / split)


@pytest.mark.serial
def test_several_devices_make_the_same_latents(runs, digits: Config, tmp_path: Path):
    config = with_data(digits, latents=str(tmp_path / "one"))
    encode.run(config)
    splits = [f"--config.data.split={config.data.split}", f"--config.data.eval_split={config.data.eval_split}"]
    runs.finish(None, *arguments(digits, tmp_path / "three", *splits), devices=3)
    folders = [tmp_path / name for name in ("one", "three")]
    one, three = (open_latents(with_data(digits, latents=str(folder)).data, "train[:20]") for folder in folders)
    for index in range(20):
        # float16 rounds the same value to a neighbour at most.
        np.testing.assert_allclose(one[index]["moments"], three[index]["moments"], rtol=2e-3, atol=1e-5)
