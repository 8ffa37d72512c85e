"""PyTorch weight files (.pt, .pth, .bin) read and written without PyTorch, and without running what a pickle asks for.

Such a file is a zip archive: `data.pkl` holds the structure as a pickle that refers to tensors, `data/0`, `data/1`, ...
hold their numbers. Before PyTorch 1.6 it was several pickles in a row with the numbers behind them; weights in
circulation have that format still, and it is read too. Only the names that tensors and plain settings need are
understood here; any other is refused, so that a hostile file can do nothing. What the tensors mean is `tables.py`'s
affair.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
from etils import epath

from nag_jax.errors import UserError
from nag_jax.storage import whole_file

Weights: TypeAlias = Literal["ema", "model"]

STORAGES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
LARGEST_TENSOR = 2**40  # elements; a view may have more of them than its storage
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that a file of torch before 1.6 starts with
_LEGACY_VERSION = 1001


def state_dict(path: epath.PathLike, weights: Weights = "ema") -> dict[str, np.ndarray]:
    """Reads the tensors of a weight file.

    Args:
        path: a state dict, or a training checkpoint that holds some under "ema" and "model".
        weights: which of them to take from a training checkpoint; a plain state dict is answered as it is.

    Returns:
        Arrays by name, in the file's order.

    Raises:
        UserError: the file is missing, damaged, of another kind, or refers to something else than tensors.
    """
    with _open(path) as file:
        content = file.content
        if not _is_state_dict(content):
            found = sorted(str(key) for key in content) if isinstance(content, dict) else []
            if weights not in found:
                raise UserError(
                    f"{path} holds no weights {weights!r}. It has: {', '.join(found) or 'no names at all'}."
                )
            content = content[weights]
        if not _is_state_dict(content):
            raise UserError(f"{path} holds no tensors by name where its weights should be; it is no state dict.")
        return {name: file.array(name, tensor) for name, tensor in content.items()}


def settings(path: epath.PathLike) -> dict[str, Any]:
    """The command-line settings that a training checkpoint keeps under "args"; empty if it keeps none.

    Raises UserError as `state_dict` does.
    """
    with _open(path) as file:
        arguments = file.content.get("args") if isinstance(file.content, dict) else None
        return dict(arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {}))


def write_state_dict(path: epath.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32 arrays by name as a file that `torch.load(path, weights_only=True)` reads.

    The members bear no date, so equal arrays make equal files.

    Raises:
        NagJaxError: the file cannot be written.
    """
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickle(tensors))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for number, array in enumerate(tensors.values()):
            member = zipfile.ZipInfo(f"archive/data/{number}")
            archive.writestr(member, np.ascontiguousarray(array, "<f4").tobytes())
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


class _Storage(NamedTuple):
    """Numbers of one member of the archive, not read yet. A tuple, for a pickle can change no field of one."""

    key: str
    dtype: np.dtype[Any]
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements; unchecked, as the pickle says."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _WeightFile:
    """An open weight file: its structure, with `_Tensor` where tensors are, and the arrays on demand."""

    path: epath.PathLike
    content: Any

    def __enter__(self) -> _WeightFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file, if it is held open."""

    def array(self, name: str, tensor: _Tensor) -> np.ndarray:
        """The numbers of a tensor, read-only where they are contiguous. Raises UserError if they are not all there."""
        storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
        numbers = [offset, *shape, *strides] if isinstance(shape, tuple) and isinstance(strides, tuple) else [None]
        sensible = isinstance(storage, _Storage) and all(type(n) is int and n >= 0 for n in numbers)
        if not sensible or len(shape) != len(strides) or math.prod(shape) >= LARGEST_TENSOR:
            raise UserError(f"{self.path} is damaged: tensor {name!r} has no sensible shape. Fetch the file again.")
        end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
        if math.prod(shape) and end > storage.size:
            raise UserError(f"{self.path} is damaged: tensor {name!r} reaches past its numbers. Fetch the file again.")
        flat = np.frombuffer(self._storage_bytes(name, storage), storage.dtype)
        if not math.prod(shape):
            return np.zeros(shape, storage.dtype)
        steps = [stride * storage.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:end], shape, steps, writeable=False)
    def _storage_bytes(self, name: str, storage: _Storage) -> bytes:
        """The numbers of a storage, as many bytes as it has. Raises UserError if they are not all there."""
        raise NotImplementedError


class _Archive(_WeightFile):
    """The format since PyTorch 1.6, a zip archive."""

    def __init__(self, path: epath.PathLike) -> None:
        self.path = path
        self._bytes: dict[str, bytes] = {}
        self._zip = _open_zip(path)
        try:
            members = [name for name in self._zip.namelist() if name.endswith("data.pkl") and name.count("/") == 1]
            if len(members) != 1:
                raise UserError(f"{path} is an archive, but not one that PyTorch writes: it has no data.pkl.")
            self._root = members[0].removesuffix("data.pkl")
            byte_order = f"{self._root}byteorder"
            if byte_order in self._zip.namelist() and self._member(byte_order) != b"little":
                raise UserError(f"{path} was written on a big-endian machine. Load and save it with torch once.")
            content = io.BytesIO(self._member(f"{self._root}data.pkl"))
            self.content = _load_pickle(_Unpickler(content, path), path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._zip.close()

    def _storage_bytes(self, name: str, storage: _Storage) -> bytes:
        if storage.key not in self._bytes:
            member = f"{self._root}data/{storage.key}"
            wanted = storage.size * storage.dtype.itemsize
            found = self._zip.getinfo(member).file_size if member in self._zip.namelist() else 0
            if found != wanted:
                raise UserError(
                    f"{self.path} is damaged: {found} bytes of the {wanted} of tensor {name!r}. Fetch the file again."
                )
            self._bytes[storage.key] = self._member(member)
        numbers = self._bytes[storage.key]
        if len(numbers) != storage.size * storage.dtype.itemsize:
            raise UserError(f"{self.path} is damaged: two sizes are given for the numbers of tensor {name!r}.")
        return numbers

    def _member(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except Exception as error:
            raise UserError(
                f"{self.path} is damaged: {name} cannot be read ({error}). Fetch the file again."
            ) from error


class _PickleRow(_WeightFile):
    """The format before PyTorch 1.6.

    Five pickles (a number that marks the format, its version, facts about the machine, the structure, the keys of the
    storages) and for every key the count of its numbers as int64 and the numbers.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = path
        stream = io.BytesIO(epath.Path(path).read_bytes())
        unpicklers = [_Unpickler(stream, path) for _ in range(5)]
        _, version, machine, self.content, keys = (_load_pickle(unpickler, path) for unpickler in unpicklers)
        if version != _LEGACY_VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UserError(f"{path} has a format that PyTorch left long ago. Load and save it with torch once.")
        storages = unpicklers[3].storages
        if not isinstance(keys, list) or not all(type(key) is str and key in storages for key in keys):
            raise UserError(f"{path} is damaged: it has numbers of tensors that it does not name. Fetch it again.")
        self._bytes: dict[str, bytes] = {}
        for key in keys:
            count = int.from_bytes(stream.read(8), "little", signed=True)
            if count != storages[key].size:
                raise UserError(f"{path} is damaged: {count} numbers where {storages[key].size} are said to be.")
            self._bytes[key] = stream.read(count * storages[key].dtype.itemsize)

    def _storage_bytes(self, name: str, storage: _Storage) -> bytes:
        numbers, wanted = self._bytes.get(storage.key, b""), storage.size * storage.dtype.itemsize
        if len(numbers) != wanted:
            found = f"{len(numbers)} bytes of the {wanted}"
            raise UserError(f"{self.path} is damaged: {found} of tensor {name!r}. Fetch the file again.")
        return numbers


class _Unpickler(pickle.Unpickler):
    """Knows the few names below and nothing else.

    They stand for functions and classes made anew for each file: a pickle may set attributes on what it names.
    """

    def __init__(self, stream: io.BytesIO, path: epath.PathLike) -> None:
        super().__init__(stream)
        self._path = path
        self.storages: dict[str, _Storage] = {}  # what was referred to

        class Settings:
            """Stands for argparse.Namespace; holds attributes and can do nothing."""

        def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any) -> _Tensor:
            return _Tensor(storage, offset, shape, strides)

        def rebuild_parameter(data: Any, *unused: Any) -> Any:
            return data

        self._known: dict[str, Any] = {
            "torch._utils._rebuild_tensor_v2": rebuild_tensor,
            "torch._utils._rebuild_parameter": rebuild_parameter,
            "torch.Size": tuple,
            "collections.OrderedDict": collections.OrderedDict,
            "argparse.Namespace": Settings,
            "builtins.set": set,
            "__builtin__.set": set,
            **{f"torch.{name}": name for name in STORAGES},  # inert, which a numpy dtype is not
        }

    def find_class(self, module: str, name: str, /) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._known:
            raise UserError(
                f"{self._path} refers to {full_name}, which no weights need; nothing of it was run. If you trust the "
                "file, load it with torch and save its state dict alone."
            )
        return self._known[full_name]

    def persistent_load(self, identifier: Any, /) -> _Storage:
        kind, storage, key, _, size, *view = identifier
        if view not in ([], [None]):
            raise pickle.UnpicklingError("a storage that is part of another, as PyTorch before 0.4 wrote it")
        if kind != "storage" or storage not in STORAGES or type(key) is not str or type(size) is not int:
            raise pickle.UnpicklingError(f"unknown reference {identifier!r}")
        self.storages[key] = _Storage(key, STORAGES[storage], size)
        return self.storages[key]


def _load_pickle(unpickler: _Unpickler, path: epath.PathLike) -> Any:
    try:
        return unpickler.load()
    except UserError:
        raise
    except Exception as error:  # A pickle that is not well-formed fails in any way that Python can.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged: its structure cannot be read ({reason}). Fetch the file again.") from error


def _open(path: epath.PathLike) -> _WeightFile:
    """Opens a weight file of either format. Raises UserError if it is neither."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist. Give a weight file of PyTorch (.pt, .pth or .bin).")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give a weight file of PyTorch (.pt, .pth or .bin).")
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    return _PickleRow(path) if start == _LEGACY_MAGIC else _Archive(path)


def _open_zip(path: epath.PathLike) -> zipfile.ZipFile:
    file = epath.Path(path).open("rb")
    start = file.read(4)
    file.seek(0)
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        file.close()
        if start == b"PK\x03\x04":
            raise UserError(f"{path} is cut short or damaged: its end is missing. Fetch the file again.") from error
        raise UserError(f"{path} is no weight file of PyTorch. Give a .pt, .pth or .bin file.") from error


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, _Tensor) for key, value in content.items())
    )


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The structure of a state dict of contiguous float32 tensors, opcode by opcode as torch writes it."""

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()

    def integer(value: int) -> bytes:
        return pickle.BININT + value.to_bytes(4, "little", signed=True)

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    def group(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    ordered_dict = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    stream = [pickle.PROTO + b"\x02", ordered_dict, pickle.MARK]
    for number, (key, array) in enumerate(tensors.items()):
        kind = (text("storage"), name("torch", "FloatStorage"), text(str(number)), text("cpu"), integer(array.size))
        storage = group(*kind) + pickle.BINPERSID
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        shape = group(*map(integer, array.shape)), group(*map(integer, strides))
        arguments = group(storage, integer(0), *shape, pickle.NEWFALSE, ordered_dict)
        stream += [text(key), name("torch._utils", "_rebuild_tensor_v2"), arguments, pickle.REDUCE]
    return b"".join([*stream, pickle.SETITEMS, pickle.STOP])
