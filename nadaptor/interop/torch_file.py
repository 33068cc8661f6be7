"""Reads the tensors of a torch checkpoint with no torch, and runs nothing that the file holds.

A checkpoint is a pickle, which `torch_pickle` interprets, and the numbers that it describes. The
file is read into memory once, and an array is a view of that: many names of one storage cost it
once. Both of torch's layouts are read: the zip archive (torch 1.6 and later) and the stream of
pickles before it. A file may come from a stranger: reading it takes at most four times its size in
memory, and a few seconds more than an honest file of its size.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nadaptor.interop.torch_pickle import RefusedError, Storage, Tensor, load_pickle, shown

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
# Tied weights have several names; more than this, in multiples of the file's size, is an attack.
_MOST = 4
_MAX_RECORDS = 2**16
_END, _END64, _LOCATOR, _RECORD, _LOCAL = (
    b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
)  # fmt: skip

Storages = Callable[[Storage], np.ndarray]


class _Record(NamedTuple):
    """A record of a zip archive, as its directory has it."""

    name: str
    flags: int
    method: int
    crc: int
    stored: int
    size: int
    header: int  # its first byte


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the state dict of a `.pth` or `.th` file.

    The state dict is the mapping the file holds, or the one under its `state_dict`,
    `model_state_dict`, `model` or `net`. Entries that are not tensors are left out.

    Args:
        path: the file, in torch's zip or legacy layout, little-endian.

    Returns:
        Arrays by name, in the file's order, dtypes (bfloat16 included) and torch's axis order. They
        are views of the file's content, and cannot be written to.

    Raises:
        ValueError: the file is missing, no regular file, truncated or damaged, holds no tensors or
            tensors of more than four times its size, or names a global other than those of a
            tensor; the message says which.

    Example:
        >>> read_torch_file("missing.pth")
        Traceback (most recent call last):
        ValueError: cannot read missing.pth: No such file or directory

    Source: torch/serialization.py and torch/_utils.py of PyTorch, for both layouts.
    """
    try:
        # A pipe or a device would be read without an end.
        if not Path(path).is_file() and not Path(path).is_dir() and Path(path).exists():
            raise RefusedError("it is no regular file")
        data = Path(path).read_bytes()
        state, storages = (_open_zip if data.startswith(_LOCAL) else _open_legacy)(data)
        tensors = _tensors(state)
        _check_total(tensors.values(), len(data))
        return {name: _array(tensor, storages) for name, tensor in tensors.items()}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except RefusedError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    # What else a damaged file fails with: numbers that are none, records that are not there.
    except (LookupError, ValueError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"cannot read {path}: truncated or damaged") from error


def _open_zip(data: bytes) -> tuple[Any, Storages]:
    """An archive: the pickle `data.pkl`, and a record for each storage in `data/`."""
    records = {record.name: record for record in _directory(data)}
    pickled = [name for name in records if name.split("/")[1:] == ["data.pkl"]]
    if len(pickled) != 1:
        raise RefusedError("it is a zip archive but no torch checkpoint: no data.pkl in a folder")
    # The folder has whatever name the file was saved under.
    root = pickled[0].removesuffix("data.pkl")
    if f"{root}byteorder" in records:
        order = _content(data, records[f"{root}byteorder"])
        _check_little_endian(bytes(order) == b"little")
    state = load_pickle(bytes(_content(data, records[pickled[0]]))).value
    read: dict[str, np.ndarray] = {}
    total = 0

    def storages(storage: Storage) -> np.ndarray:
        nonlocal total
        if storage.key not in read:
            record = records[f"{root}data/{storage.key}"]
            if record.size != storage.size * storage.dtype.itemsize:
                of = f"{storage.size} {storage.kind} values"
                raise RefusedError(f"its record {shown(record.name)} is not of {of}")
            read[storage.key] = np.frombuffer(_content(data, record), storage.dtype)
            total += record.size
            if total > len(data):
                raise RefusedError("its records lie on each other")
        return read[storage.key]

    return state, storages


def _directory(data: bytes) -> Iterable[_Record]:
    """The records of a zip archive, by the directory at its end.

    Source: PKWARE's APPNOTE.TXT, 4.3.12 to 4.3.16.
    """
    # The directory ends at most so many bytes before the file does: a comment has two for its size.
    end = data.rfind(_END, max(0, len(data) - 2**16 - 22))
    if end < 0:
        raise RefusedError("it is truncated: the directory of its zip archive is missing")
    count, _, place = struct.unpack_from("<HII", data, end + 10)
    # An archive of 64 bits has the place of its directory right before the end.
    if end >= 20 and data[end - 20 : end - 16] == _LOCATOR:
        (end64,) = struct.unpack_from("<Q", data, end - 12)
        if data[end64 : end64 + 4] != _END64:
            raise RefusedError("the directory of its zip archive is damaged")
        count, _, place = struct.unpack_from("<QQQ", data, end64 + 32)
    if count > _MAX_RECORDS:
        raise RefusedError(f"it has {count} records; save a plain state dict")
    for _ in range(count):
        record, place = _record(data, place)
        yield record


def _record(data: bytes, place: int) -> tuple[_Record, int]:
    """The record whose entry of the directory begins at a byte, and the byte after that."""
    if data[place : place + 4] != _RECORD:
        raise RefusedError("the directory of its zip archive is damaged")
    flags, method, crc, stored, size, named, extra, comment, header = struct.unpack_from(
        "<HH4xIIIHHH8xI", data, place + 8
    )
    name = data[place + 46 : place + 46 + named]
    more = data[place + 46 + named : place + 46 + named + extra]
    size, stored, header = _wide(more, size, stored, header)
    record = _Record(name.decode("utf-8", "replace"), flags, method, crc, stored, size, header)
    return record, place + 46 + named + extra + comment


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values of 32 bits, in place of each that is all ones the one of 64 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        wide = extra[4 : 4 + length] if kind == 1 else wide
        extra = extra[4 + length :]
    # APPNOTE 4.5.3: in this order, and only those whose short field is all ones.
    found = []
    for value in values:
        if value == 0xFFFFFFFF:
            (value,), wide = struct.unpack_from("<Q", wide), wide[8:]
        found.append(value)
    return found


def _content(data: bytes, record: _Record) -> memoryview:
    """The bytes of a record, in place."""
    name = shown(record.name)
    if record.method != 0 or record.flags & 1 or record.stored != record.size:
        raise RefusedError(f"its record {name} is compressed or encrypted, which torch never does")
    if data[record.header : record.header + 4] != _LOCAL:
        raise RefusedError(f"its record {name} is damaged")
    # The extra field differs from the directory's: torch pads with it to align the numbers.
    named, extra = struct.unpack_from("<HH", data, record.header + 26)
    start = record.header + 30 + named + extra
    content = memoryview(data)[start : start + record.size]
    if len(content) != record.size:
        raise RefusedError(f"it is truncated: its record {name} is cut off")
    if zlib.crc32(content) != record.crc:
        raise RefusedError(f"its record {name} is damaged: its CRC-32 is another")
    return content


def _open_legacy(data: bytes) -> tuple[Any, Storages]:
    """A stream: magic, version, machine, the object, the order of the storages, the storages."""
    magic, _, place = load_pickle(data)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise RefusedError("it is no torch checkpoint: torch's magic number is missing")
    machine = load_pickle(data, load_pickle(data, place).end)
    _check_little_endian(type(machine.value) is dict and machine.value["little_endian"])
    state, described, place = load_pickle(data, machine.end)
    keys, _, place = load_pickle(data, place)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise RefusedError("its list of storages is damaged")
    read = {}
    for key in keys:
        storage = described[key]
        read[key], place = _legacy_storage(data, place, storage)
    return state, lambda storage: read[storage.key]


def _legacy_storage(data: bytes, place: int, storage: Storage) -> tuple[np.ndarray, int]:
    """The numbers of the storage that begins at a byte, and the byte after them."""
    if place + 8 > len(data):
        raise RefusedError("it is truncated: a storage is missing")
    (size,) = struct.unpack_from("<q", data, place)
    if size != storage.size:
        raise RefusedError(
            f"its storage {shown(storage.key)} has {size} values, not {storage.size}"
        )
    end = place + 8 + size * storage.dtype.itemsize
    if end > len(data):
        raise RefusedError(f"it is truncated: {end - len(data)} bytes of a storage are missing")
    return np.frombuffer(data, storage.dtype, size, place + 8), end


def _tensors(state: Any) -> dict[str, Tensor]:
    """The tensors of the state dict that the file is or contains."""
    outer = state if type(state) is dict else {}
    inner = [outer[name] for name in _CONTAINERS if type(outer.get(name)) is dict]
    entries = inner[0] if inner else outer
    tensors = {str(k): v for k, v in entries.items() if type(v) is Tensor}
    if not tensors:
        raise RefusedError(
            f"it holds no state dict: no mapping of names to tensors in it or under "
            f"{', '.join(_CONTAINERS)}"
        )
    return tensors


def _check_total(tensors: Iterable[Tensor], file_size: int) -> None:
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors)
    if total > _MOST * file_size:
        raise RefusedError(f"its tensors would take {total} bytes, and it has {file_size}")


def _array(tensor: Tensor, storages: Storages) -> np.ndarray:
    """The numbers of a tensor; its view must lie within its storage, without repetition."""
    flat, size = storages(tensor.storage), math.prod(tensor.shape)
    if size == 0:
        return np.zeros(tensor.shape, flat.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((count - 1) * stride for count, stride in steps)
    if last >= flat.size or size > flat.size:
        raise RefusedError(
            f"its tensor of shape {tensor.shape} at offset {tensor.offset} with strides "
            f"{tensor.strides} leaves or repeats its storage of {flat.size} values"
        )
    strides = [stride * flat.itemsize for stride in tensor.strides]
    at = flat[tensor.offset :]
    # It checks no bounds of its own.
    return np.lib.stride_tricks.as_strided(at, tensor.shape, strides, writeable=False)


def _check_little_endian(little: Any) -> None:
    if not little:
        raise RefusedError("it was written on a big-endian machine")
