"""Reads the tensors of a torch checkpoint with no torch, and runs nothing that the file holds.

A checkpoint is a pickle, and a pickle may call any function it names. The unpickler here knows
ordered dictionaries and tensors; any other name is refused before anything is called. A tensor
comes out of the pickle as a description (storage, offset, shape, strides), and its numbers are
read afterwards, within the bounds of its storage. Both of torch's layouts are read: the zip archive
(torch 1.6 and later) and the stream of pickles before it.
"""

import collections
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
_DTYPES = {
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


class _Storage(NamedTuple):
    """A flat run of numbers in the file."""

    key: str
    kind: str
    size: int

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.kind]


class _Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Storages = Callable[[_Storage], np.ndarray]


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the state dict of a `.pth` or `.th` file.

    The state dict is the mapping the file holds, or the one under its `state_dict`,
    `model_state_dict`, `model` or `net`. Entries that are not tensors are left out.

    Args:
        path: the file, in torch's zip or legacy layout, little-endian.

    Returns:
        Arrays by name, in the file's order, dtypes (bfloat16 included) and torch's axis order.

    Raises:
        ValueError: the file is missing, truncated or damaged, holds no tensors, or names a global
            other than those of a tensor; the message says which.

    Example:
        >>> read_torch_file("missing.pth")
        Traceback (most recent call last):
        ValueError: cannot read missing.pth: No such file or directory

    Source: torch/serialization.py and torch/_utils.py of PyTorch, for both layouts.
    """
    try:
        with open(path, "rb") as file:
            state, storages = (_open_zip if _is_zip(file) else _open_legacy)(file)
            return {name: _array(tensor, storages) for name, tensor in _tensors(state).items()}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    # A hostile or damaged pickle can fail in any way: nothing it does is worth a traceback.
    except Exception as error:
        reason = error if isinstance(error, _RefusedError) else f"truncated or damaged ({error!r})"
        raise ValueError(f"cannot read {path}: {reason}") from error


class _RefusedError(ValueError):
    """What a file asks for and does not get, as one readable line."""


class _Unpickler(pickle.Unpickler):
    """Builds plain containers, numbers and strings, ordered dictionaries and tensors."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name == "collections.OrderedDict":
            return collections.OrderedDict
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return _RebuildTensor()
        if name == "torch._utils._rebuild_parameter":
            return _RebuildParameter()
        if module_name == "torch" and global_name in _DTYPES:
            return global_name
        raise _RefusedError(
            f"it asks for {name}, and only tensors and ordered dictionaries are built; save a "
            "plain state dict, or use .safetensors"
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        tag, kind, key, _, size, *view = pid
        if tag != "storage" or kind not in _DTYPES or any(part is not None for part in view):
            raise _RefusedError(f"it holds a storage of an unknown sort: {kind!r}")
        return self.storages.setdefault(str(key), _Storage(str(key), kind, _count(size)))


class _RebuildTensor:
    # A pickle can set the attributes of what find_class returns: a slotted instance has none,
    # where a function would take them and keep them for the next file.
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        tensor = _Tensor(
            storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, strides))
        )
        if not isinstance(storage, _Storage) or len(tensor.shape) != len(tensor.strides):
            raise _RefusedError("it holds a tensor without a storage, or with too few strides")
        return tensor


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *rest: Any) -> Any:
        return data


def _is_zip(file: BinaryIO) -> bool:
    # Not zipfile.is_zipfile, which a truncated archive fails.
    magic = file.read(4)
    file.seek(0)
    return magic == b"PK\x03\x04"


def _open_zip(file: BinaryIO) -> tuple[Any, Storages]:
    archive = zipfile.ZipFile(file)
    pickled = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
    if len(pickled) != 1:
        raise _RefusedError("it is a zip archive but no torch checkpoint: no data.pkl in a folder")
    root = pickled[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist():
        _check_little_endian(archive.read(f"{root}byteorder") == b"little")

    def storages(storage: _Storage) -> np.ndarray:
        name = f"{root}data/{storage.key}"
        # Before reading: a small archive may promise to unpack to terabytes.
        if archive.getinfo(name).file_size != storage.size * storage.dtype.itemsize:
            raise _RefusedError(f"its record {name} is not of {storage.size} {storage.kind} values")
        return np.frombuffer(archive.read(name), storage.dtype)

    with archive.open(pickled[0]) as stream:
        return _Unpickler(stream).load(), storages


def _open_legacy(file: BinaryIO) -> tuple[Any, Storages]:
    """A stream: magic, version, machine, the object, the order of the storages, the storages."""
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise _RefusedError("it is no torch checkpoint: torch's magic number is missing")
    _Unpickler(file).load()
    _check_little_endian(_Unpickler(file).load()["little_endian"])
    unpickler = _Unpickler(file)
    state, keys = unpickler.load(), _Unpickler(file).load()
    contents = {}
    for key in map(str, keys):
        storage = unpickler.storages[key]
        size = int.from_bytes(_exactly(file, 8), "little")
        if size != storage.size:
            raise _RefusedError(f"its storage {key} has {size} values, not {storage.size}")
        data = _exactly(file, size * storage.dtype.itemsize)
        contents[key] = np.frombuffer(data, storage.dtype)
    return state, lambda storage: contents[storage.key]


def _exactly(file: BinaryIO, size: int) -> bytes:
    missing = size - (os.fstat(file.fileno()).st_size - file.tell())
    if missing > 0:
        raise _RefusedError(f"it is truncated: {missing} bytes of a storage are missing")
    return file.read(size)


def _tensors(state: Any) -> dict[str, _Tensor]:
    """The tensors of the state dict that the file is or contains."""
    outer = state if isinstance(state, Mapping) else {}
    inner = [outer[name] for name in _CONTAINERS if isinstance(outer.get(name), Mapping)]
    entries = inner[0] if inner else outer
    tensors = {str(k): v for k, v in entries.items() if isinstance(v, _Tensor)}
    if not tensors:
        raise _RefusedError(
            f"it holds no state dict: no mapping of names to tensors in it or under "
            f"{', '.join(_CONTAINERS)}"
        )
    return tensors


def _array(tensor: _Tensor, storages: Storages) -> np.ndarray:
    """The numbers of a tensor; its view must lie within its storage, without repetition."""
    flat, size = storages(tensor.storage), math.prod(tensor.shape)
    if size == 0:
        return np.zeros(tensor.shape, flat.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((count - 1) * stride for count, stride in steps)
    if last >= flat.size or size > flat.size:
        raise _RefusedError(
            f"its tensor of shape {tensor.shape} at offset {tensor.offset} with strides "
            f"{tensor.strides} leaves or repeats its storage of {flat.size} values"
        )
    strides = [stride * flat.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
    return view.copy()


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _RefusedError(f"it holds a size, stride or offset that is no count: {value!r}")
    return value


def _check_little_endian(little: Any) -> None:
    if not little:
        raise _RefusedError("it was written on a big-endian machine")
