"""The constants of a frozen TensorFlow graph (.pb) read without TensorFlow.

A frozen graph is a protocol buffer, a GraphDef, whose weights stand in nodes of kind Const. tensorboardX carries that
schema in copies of TensorFlow's own .proto files, so that no reader of the format is written here. What the constants
mean is `feature_nets.py`'s affair.
"""

from __future__ import annotations

import math

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.tensor_pb2 import TensorProto

from nag_jax.errors import UserError

FLOAT = 1  # DT_FLOAT of tensorflow/core/framework/types.proto


def float_constants(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The float32 constants of a graph.

    Args:
        path: a serialized GraphDef.

    Returns:
        Arrays by name of the node, in the file's order and layout; constants of other types are left out.

    Raises:
        UserError: the file is missing, damaged or no GraphDef, or a constant has not the numbers that its shape needs.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file. Give a frozen TensorFlow graph (.pb).")
    try:
        graph = GraphDef.FromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is cut short, damaged or no frozen TensorFlow graph. Fetch it again.") from error
    if not graph.node:
        raise UserError(f"{path} has no nodes; it is no frozen TensorFlow graph (.pb).")
    constants = {}
    for node in graph.node:
        if node.op == "Const" and node.attr["value"].tensor.dtype == FLOAT:
            constants[node.name] = _array(node.attr["value"].tensor, f"{path}: constant {node.name}")
    return constants


def _array(tensor: TensorProto, what: str) -> np.ndarray:
    """The numbers of a tensor: little-endian bytes, or a list of which the last number fills the rest."""
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if any(size < 0 for size in shape):
        raise UserError(f"{what} has the shape {shape}, which is none. Fetch the file again.")
    size = math.prod(shape)
    if tensor.tensor_content:
        numbers = tensor.tensor_content
        if len(numbers) != 4 * size:
            raise UserError(f"{what} has {len(numbers)} bytes of the {4 * size} of its shape. Fetch the file again.")
        return np.frombuffer(numbers, "<f4").reshape(shape)
    listed = np.asarray(tensor.float_val, np.float32)
    if len(listed) > size or (size and not len(listed)):
        raise UserError(f"{what} has {len(listed)} numbers of the {size} of its shape. Fetch the file again.")
    return np.pad(listed, (0, size - len(listed)), mode="edge").reshape(shape) if size else np.zeros(shape, np.float32)
