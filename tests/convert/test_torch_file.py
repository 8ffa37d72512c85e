"""Weight files without torch: every layout that torch writes, and nothing that a hostile file asks for."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nag_jax.convert import torch_file
from nag_jax.errors import UserError


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 4), "a.bias": (3,), "conv": (2, 3, 2, 2), "scalar": (), "empty": (0, 2)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape
        assert actual[name].tobytes() == array.tobytes(), name


def archive(path: Path, content: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        for name, data in members.items():
            file.writestr(f"archive/data/{name}", data)
    return path


# Reading and writing


def test_what_is_written_is_read(tmp_path: Path):
    torch_file.write_state_dict(tmp_path / "w.pt", tensors())
    assert_same(torch_file.state_dict(tmp_path / "w.pt"), tensors())


@pytest.mark.parity
def test_torch_reads_what_is_written(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch_file.write_state_dict(tmp_path / "w.pt", tensors())
    for mmap in (False, True):
        state = torch.load(tmp_path / "w.pt", weights_only=True, mmap=mmap)
        assert_same({name: value.numpy() for name, value in state.items()}, tensors())


@pytest.mark.parity
def test_every_dtype_stride_offset_and_shared_storage(tmp_path: Path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    state: dict[str, Any] = {name: torch.tensor([[0, 1], [2, 3]]).to(getattr(torch, name)) for name in names}
    views = {"base": base, "transposed": base.T, "part": base[1:3, ::2], "expanded": base[0, :1].expand(3)}
    state |= {**views, "parameter": torch.nn.Parameter(base[2])}
    torch.save(state, tmp_path / "w.pt")
    read = torch_file.state_dict(tmp_path / "w.pt")
    for name in names:
        assert str(read[name].dtype) == name
    for name, value in state.items():
        wide = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        np.testing.assert_array_equal(np.asarray(read[name], wide.numpy().dtype), wide.numpy())
        assert read[name].shape == tuple(value.shape)


@pytest.mark.parity
def test_files_from_before_torch_1_6_and_every_damage_to_one(tmp_path: Path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    count, half = torch.tensor(7), base.to(torch.float16)
    state = OrderedDict({"base": base, "part": base[1:3, ::2], "count": count, "half": half, "no": base[:0]})
    file = tmp_path / "w.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert_same(torch_file.state_dict(file), {name: value.numpy() for name, value in state.items()})
    torch.save({"ema": state, "args": argparse.Namespace(depth=2)}, file, _use_new_zipfile_serialization=False)
    assert_same(torch_file.state_dict(file), {name: value.numpy() for name, value in state.items()})
    assert torch_file.settings(file) == {"depth": 2}

    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged|no weight file"):
            torch_file.state_dict(file)


@pytest.mark.parametrize("hostile", [0, 1, 2, 3, 4])
def test_nothing_that_a_file_from_before_torch_1_6_asks_for_is_run(tmp_path: Path, hostile):
    made = tmp_path / "made"
    machine = {"protocol_version": 1001, "little_endian": True}
    row: list[Any] = [0x1950A86A20F9469CFC6C, 1001, machine, {}, []]
    if hostile:
        row[hostile] = Hostile(os.system, f"touch {made}")
    else:
        row[3] = {"a": Hostile(os.system, f"touch {made}")}
    (tmp_path / "w.pth").write_bytes(b"".join(pickle.dumps(each, protocol=2) for each in row))
    with pytest.raises(UserError, match=r"\w+\.system"):
        torch_file.state_dict(tmp_path / "w.pth")
    assert not made.exists()


@pytest.mark.parity
def test_the_average_of_a_training_checkpoint_is_the_default(tmp_path: Path):
    torch = pytest.importorskip("torch")
    network = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    average = {name: value + 1 for name, value in network.state_dict().items()}
    arguments = argparse.Namespace(model="SiT-XL/2", path_type="Linear")
    checkpoint = {"model": network.state_dict(), "ema": average, "opt": optimizer.state_dict(), "args": arguments}
    torch.save(checkpoint, tmp_path / "w.pt")
    model = torch_file.state_dict(tmp_path / "w.pt", weights="model")
    np.testing.assert_array_equal(model["weight"], network.weight.detach().numpy())
    np.testing.assert_array_equal(torch_file.state_dict(tmp_path / "w.pt")["weight"], average["weight"].numpy())
    assert torch_file.settings(tmp_path / "w.pt") == {"model": "SiT-XL/2", "path_type": "Linear"}

    torch.save({"model": network.state_dict()}, tmp_path / "no_average.pt")
    with pytest.raises(UserError, match="no weights 'ema'. It has: model"):
        torch_file.state_dict(tmp_path / "no_average.pt")


# Hostile files


class Hostile:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, r"\w+\.system"), (eval, r"\w+\.eval"), (getattr, r"\w+\.getattr")]
)
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path: Path, function, name, protocol, nested):
    made = tmp_path / "made"
    code = {os.system: (f"touch {made}",), eval: (f"open({str(made)!r}, 'w')",), getattr: (made, "touch")}[function]
    arguments = tuple(map(str, code)) if function is getattr else code
    payload: Any = Hostile(function, *arguments)
    if nested:
        payload = {"args": argparse.Namespace(inside=[OrderedDict(deep=Hostile(payload.call[0], *arguments))])}
    path = archive(tmp_path / "w.pt", pickle.dumps(payload, protocol=protocol))
    with pytest.raises(UserError, match=f"w.pt refers to {name if not nested or protocol > 1 else ''}"):
        torch_file.state_dict(path)
    assert not made.exists()


def test_attributes_of_what_a_file_names_do_not_outlive_it(tmp_path: Path):
    # Sets __setstate__ on the class that stands for argparse.Namespace, then asks for an instance with a state.
    stream = b"\x80\x02cargparse\nNamespace\n(N}U\x0c__setstate__ccollections\nOrderedDict\nstb."
    good = pickle.dumps({"args": argparse.Namespace(a=1)}, protocol=2)
    # The same on the dtype of a storage.
    storage = b"\x80\x02ctorch\nFloatStorage\n(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."
    for content in (stream, storage, good):
        path = archive(tmp_path / "w.pt", content)
        with pytest.raises(UserError):
            torch_file.state_dict(path)
    assert torch_file.settings(path) == {"a": 1}
    assert torch_file.STORAGES["FloatStorage"] == np.dtype("<f4") and np.dtype("<f4").str == "<f4"


# Files that are something else, or damaged


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no weight file of PyTorch"),
        (b"hello\n", "no weight file of PyTorch"),
        (b"", "no weight file of PyTorch"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(50), "structure cannot be read"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, content, words):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        torch_file.state_dict(tmp_path / "w.pt")


def test_missing_files_folders_and_other_archives_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        torch_file.state_dict(tmp_path / "w.pt")
    with pytest.raises(UserError, match="is a folder"):
        torch_file.state_dict(tmp_path)
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    with pytest.raises(UserError, match="no data.pkl"):
        torch_file.state_dict(tmp_path / "w.npz")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    torch_file.write_state_dict(tmp_path / "w.pt", tensors())
    whole = (tmp_path / "w.pt").read_bytes()
    for length in range(4, len(whole), 97):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short or damaged"):
            torch_file.state_dict(tmp_path / "cut.pt")


def test_a_flipped_byte_is_noticed(tmp_path: Path):
    torch_file.write_state_dict(tmp_path / "w.pt", {"a": np.full(4, 7.25, np.float32)})
    whole = (tmp_path / "w.pt").read_bytes()
    number = struct.pack("<f", 7.25)
    (tmp_path / "w.pt").write_bytes(whole.replace(number, b"\0\0\0\0", 1))
    with pytest.raises(UserError, match="damaged"):
        torch_file.state_dict(tmp_path / "w.pt")


def test_tensors_that_do_not_fit_their_numbers_are_refused(tmp_path: Path):
    content = torch_file._pickle({"a": np.zeros((2, 3), np.float32)})
    for numbers in ({}, {"0": bytes(20)}, {"0": bytes(28)}):
        with pytest.raises(UserError, match=r"damaged.*'a'"):
            torch_file.state_dict(archive(tmp_path / "w.pt", content, **numbers))
    longer = content.replace(struct.pack("<i", 2), struct.pack("<i", 3))
    with pytest.raises(UserError, match=r"'a' reaches past"):
        torch_file.state_dict(archive(tmp_path / "w.pt", longer, **{"0": bytes(24)}))
    huge = content.replace(
        struct.pack("<i", 2) + b"J" + struct.pack("<i", 3), b"\xff\xff\xff\x7fJ\xff\xff\xff\x7f"
    ).replace(struct.pack("<i", 3) + b"J" + struct.pack("<i", 1), bytes(4) + b"J" + bytes(4))
    with pytest.raises(UserError, match=r"'a' has no sensible shape"):
        torch_file.state_dict(archive(tmp_path / "w.pt", huge, **{"0": bytes(24)}))
    with pytest.raises(UserError, match="structure cannot be read"):
        torch_file.state_dict(archive(tmp_path / "w.pt", content[:-40]))
