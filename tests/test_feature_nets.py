"""Folders of feature nets: what is written is read, and nothing else is taken for one."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from nag_jax import storage
from nag_jax.errors import NagJaxError, UserError
from nag_jax.feature_nets import (
    FEATURE_NET_FILE,
    WEIGHTS_FILE,
    FeatureNetDescription,
    load_feature_net,
    write_feature_net,
)
from nag_jax.models import efficientnet
from nag_jax.params_hash import params_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), efficientnet.param_shapes())
    description = FeatureNetDescription(efficientnet.NAME, "w.pth", "ab" * 32, params_hash(params))
    write_feature_net(tmp_path / "net", description, params)
    return tmp_path / "net"


def test_what_is_written_is_read(folder: Path):
    net = load_feature_net(folder)
    assert net.name == efficientnet.NAME and net.dimension == 1280
    written = json.loads((folder / FEATURE_NET_FILE).read_text())
    assert net.fingerprint == params_hash(net.params) == written["fingerprint"]


def test_folders_without_and_with_other_content_are_named(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds no feature net.*nag_jax.convert SOURCE .* --kind=features"):
        load_feature_net(tmp_path)

    description = json.loads((folder / FEATURE_NET_FILE).read_text())
    (folder / FEATURE_NET_FILE).write_text(json.dumps(description | {"network": "resnet"}))
    with pytest.raises(UserError, match="'resnet'; known are"):
        load_feature_net(folder)
    (folder / FEATURE_NET_FILE).write_text(json.dumps(description))

    weights = safetensors.numpy.load((folder / WEIGHTS_FILE).read_bytes())
    weights["fc/bias"] = weights["fc/bias"] + np.float32(1)
    (folder / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(weights))
    with pytest.raises(UserError, match="is not what feature_net.json beside it describes"):
        load_feature_net(folder)
    (folder / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="missing or damaged"):
        load_feature_net(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load_feature_net(folder)


def test_a_conversion_that_broke_off_leaves_no_feature_net(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*arguments: object) -> None:
        raise NagJaxError("full")

    monkeypatch.setattr(storage, "write_json", full_disk)
    with pytest.raises(NagJaxError, match="full"):
        write_feature_net(folder, FeatureNetDescription(efficientnet.NAME, "w.pth", "0", "0"), {"a": np.ones(2)})
    with pytest.raises(UserError, match="holds no feature net"):
        load_feature_net(folder)
