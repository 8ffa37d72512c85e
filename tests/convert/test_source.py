"""What lies at a source: files of both formats, folders in one file or several, pipelines, and folders with a lack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from nag_jax.convert import torch_file
from nag_jax.convert.source import read_source, recognise_layout
from nag_jax.errors import UserError

WEIGHTS = "diffusion_pytorch_model"


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)


def test_a_file_of_either_format(official, tmp_path: Path):
    torch_file.write_state_dict(tmp_path / "w.pt", official)
    safetensors.numpy.save_file(official, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        source = read_source(tmp_path / name)
        assert_same(source.tensors, official)
        assert source.layout == "official" and source.config is None and not source.settings


def test_a_folder_in_one_file_or_its_file(diffusers_folder: Path, diffusers_tensors, diffusers_config):
    for path in (diffusers_folder, diffusers_folder / f"{WEIGHTS}.safetensors"):
        source = read_source(path)
        assert_same(source.tensors, diffusers_tensors)
        assert source.config == diffusers_config and source.layout == "diffusers dit"
    (diffusers_folder / f"{WEIGHTS}.safetensors").unlink()
    torch_file.write_state_dict(diffusers_folder / f"{WEIGHTS}.bin", diffusers_tensors)
    assert_same(read_source(diffusers_folder).tensors, diffusers_tensors)


def in_shards(folder: Path, tensors, end: str) -> dict[str, str]:
    """Writes the weights of a folder in two files with an index, and returns what the index says."""
    (folder / f"{WEIGHTS}.safetensors").unlink(missing_ok=True)
    names = list(tensors)
    places = {name: f"{WEIGHTS}-0000{1 + names.index(name) % 2}-of-00002.{end}" for name in names}
    for file in set(places.values()):
        shard = {name: tensors[name] for name in names if places[name] == file}
        if end == "safetensors":
            safetensors.numpy.save_file(shard, folder / file)
        else:
            torch_file.write_state_dict(folder / file, shard)
    (folder / f"{WEIGHTS}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_a_folder_in_several_files(diffusers_folder: Path, diffusers_tensors, end):
    in_shards(diffusers_folder, diffusers_tensors, end)
    assert_same(read_source(diffusers_folder).tensors, diffusers_tensors)


def test_files_that_do_not_fit_their_index_are_named(diffusers_folder: Path, diffusers_tensors):
    places = in_shards(diffusers_folder, diffusers_tensors, "safetensors")
    index = diffusers_folder / f"{WEIGHTS}.safetensors.index.json"
    for content, words in (
        ({"weight_map": places | {"x": next(iter(places.values()))}}, "disagree about tensor x"),
        ({"weight_map": {name: f"../{file}" for name, file in places.items()}}, "is damaged"),
        ({"metadata": {}}, "is damaged"),
        ([], "is damaged"),
        ({"weight_map": places | {"x": "other.safetensors"}}, "other.safetensors is missing"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            read_source(diffusers_folder)


def test_a_pipeline_gives_the_network_or_the_autoencoder(diffusers_folder: Path, vae_folder: Path, tmp_path: Path):
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="pipeline without transformer or vae/"):
        read_source(pipeline)
    vae_folder.rename(pipeline / "vae")
    assert read_source(pipeline).path == pipeline / "vae"
    with pytest.raises(UserError, match="pipeline without transformer/"):
        read_source(pipeline, part="network")
    diffusers_folder.rename(pipeline / "transformer")
    assert read_source(pipeline).layout == "diffusers dit"
    assert read_source(pipeline, part="autoencoder").layout == "autoencoder"


def test_what_cannot_be_read_is_named(diffusers_folder: Path, tmp_path: Path):
    (diffusers_folder / f"{WEIGHTS}.safetensors").rename(diffusers_folder / f"{WEIGHTS}.fp16.safetensors")
    pointer = tmp_path / "w.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    ours = {name: tmp_path / name for name in ("model.json", "vae.json", "empty")}
    for name, folder in ours.items():
        folder.mkdir()
        if name != "empty":
            (folder / name).write_text("{}")
    for path, words in (
        (tmp_path / "missing", "does not exist"),
        (diffusers_folder, r"has diffusion_pytorch_model.fp16.safetensors, but none of.*in float32"),
        (pointer, "only points to a file that Git LFS keeps"),
        (ours["model.json"], "folder of this project already"),
        (ours["vae.json"], "folder of this project already"),
        (ours["empty"], "no config.json of diffusers"),
    ):
        with pytest.raises(UserError, match=words):
            read_source(path)


def test_names_tell_the_layout(official, diffusers_tensors):
    assert recognise_layout(official) == "official"
    assert recognise_layout(diffusers_tensors) == "diffusers dit"
    assert recognise_layout(["quant_conv.bias", "encoder.conv_in.bias"]) == "autoencoder"
    assert recognise_layout(["first_stage_model.encoder.conv_in.bias"]) == "autoencoder"
