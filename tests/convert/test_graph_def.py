"""Frozen TensorFlow graphs, written here byte by byte as the protocol buffer format says."""

import os
from pathlib import Path

import numpy as np
import pytest

from nag_jax.convert import graph_def
from nag_jax.errors import UserError

FLOAT, INT32 = 1, 3


def varint(number: int) -> bytes:
    if number < 128:
        return bytes([number])
    return bytes([number % 128 + 128]) + varint(number // 128)


def field(number: int, content: bytes | int) -> bytes:
    """A field of a message: a whole number (wire type 0), or bytes with their length (wire type 2)."""
    if isinstance(content, int):
        return varint(8 * number) + varint(content)
    return varint(8 * number + 2) + varint(len(content)) + content


def tensor(shape: tuple[int, ...], numbers: bytes, dtype: int = FLOAT) -> bytes:
    """TensorProto: dtype 1, tensor_shape 2 {dim 2 {size 1}}; `numbers` are its fields that hold them."""
    dims = b"".join(field(2, field(1, size)) for size in shape)
    return field(1, dtype) + field(2, dims) + numbers


def constant(name: str, value: bytes) -> bytes:
    """GraphDef.node 1: NodeDef {name 1, op 2, attr 5 {key 1, value 2 {type 6 | tensor 8}}}."""
    dtype = field(5, field(1, b"dtype") + field(2, field(6, FLOAT)))
    attribute = field(5, field(1, b"value") + field(2, field(8, value)))
    return field(1, field(1, name.encode()) + field(2, b"Const") + dtype + attribute)


def array_constant(name: str, array: np.ndarray) -> bytes:
    return constant(name, tensor(array.shape, field(4, array.astype("<f4").tobytes())))


def other_node(name: str, op: str, source: str) -> bytes:
    return field(1, field(1, name.encode()) + field(2, op.encode()) + field(3, source.encode()))


def write(path: Path, *nodes: bytes) -> Path:
    path.write_bytes(b"".join(nodes) + field(3, 9))
    return path


def test_constants_in_every_way_that_tensorflow_writes_them(tmp_path: Path):
    kernel = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32)
    packed = field(5, np.array([1, 2, 3], "<f4").tobytes())
    single = [varint(8 * 5 + 5) + np.array(value, "<f4").tobytes() for value in (1, 2)]
    file = write(
        tmp_path / "graph.pb",
        array_constant("conv/conv2d_params", kernel),
        other_node("conv/Conv2D", "Conv2D", "conv/conv2d_params"),
        constant("packed", tensor((3,), packed)),
        constant("last_number_fills", tensor((2, 2), b"".join(single))),
        constant("scalar", tensor((), single[1])),
        constant("empty", tensor((0, 4), b"")),
        constant("pool_3/_reshape/shape", tensor((2,), field(4, np.array([1, 2], "<i4").tobytes()), INT32)),
    )
    constants = graph_def.float_constants(file)
    assert list(constants) == ["conv/conv2d_params", "packed", "last_number_fills", "scalar", "empty"]
    np.testing.assert_array_equal(constants["conv/conv2d_params"], kernel)
    np.testing.assert_array_equal(constants["packed"], [1, 2, 3])
    np.testing.assert_array_equal(constants["last_number_fills"], [[1, 2], [2, 2]])
    assert constants["scalar"].shape == () and constants["scalar"] == 2
    assert constants["empty"].shape == (0, 4)
    assert all(array.dtype == np.float32 for array in constants.values())


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (field(4, bytes(8)), "constant a has 8 bytes of the 12"),
        (field(5, bytes(16)), "constant a has 4 numbers of the 3"),
        (b"", "constant a has 0 numbers of the 3"),
    ],
)
def test_constants_without_their_numbers_are_named(tmp_path: Path, numbers, words):
    with pytest.raises(UserError, match=words):
        graph_def.float_constants(write(tmp_path / "graph.pb", constant("a", tensor((3,), numbers))))


def test_other_and_damaged_files_are_named(tmp_path: Path):
    file = tmp_path / "graph.pb"
    with pytest.raises(UserError, match="is no file"):
        graph_def.float_constants(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="no nodes"):
        graph_def.float_constants(file)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(100))
    with pytest.raises(UserError, match="no frozen TensorFlow graph"):
        graph_def.float_constants(file)
    whole = array_constant("a", np.ones(5, np.float32))
    file.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="cut short"):
        graph_def.float_constants(file)
    file.write_bytes(array_constant("a", np.ones(1, np.float32)) + field(1, field(2, b"Const")))
    assert list(graph_def.float_constants(file)) == ["a"]
